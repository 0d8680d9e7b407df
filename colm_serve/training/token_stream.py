"""Training sequences made from documents as they come, in a buffer of bounded size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from colm_serve.training.config import TrainConfig
from colm_serve.training.corpus import Document
from colm_serve.training.document_encoder import DocumentEncoder
from colm_serve.training.streamed_corpus import DocumentStream

_DOCUMENTS_AT_ONCE = 32


@dataclass(frozen=True)
class BlockStart:
    """Where a block of windows begins.

    Attributes:
        block: its number, from 0.
        documents: the stream's state before the documents with the block's first token; None:
            those are the stream's first.
        first_token: that token's place among those documents' tokens.
    """

    block: int = 0
    documents: dict[str, Any] | None = None
    first_token: int = 0


class TokenStream:
    """Windows of seq_len + 1 tokens, shuffled block by block.

    A block is in memory, with the end of the documents that it was made from. What is asked for
    must not lie before the current block.

    Args:
        documents: a stream that nothing was taken from.
        lane: another number, another order.
        state: where to begin; default: at the beginning.
    """

    def __init__(
        self,
        documents: DocumentStream,
        encoder: DocumentEncoder,
        config: TrainConfig,
        lane: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        assert config.stream is not None
        self._documents, self._encoder = documents, encoder
        self._seq_len, self._num_windows = config.seq_len, config.stream.shuffle_sequences
        self._seed = (config.seed, lane)
        self._start = BlockStart(**state or {})
        if self._start.documents is not None:
            documents.go_on_from(self._start.documents)
        self._before_batch = self._start.documents
        self._batch_tokens = 0
        self._rest = self._read_batch()[self._start.first_token :]
        self._windows: list[npt.NDArray[np.uint32]] = []
        self._read_block()

    @property
    def state(self) -> dict[str, Any]:
        """Plain values from which a stream goes on with the current block."""
        return asdict(self._start)

    def windows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Token ids [count, seq_len + 1] of the windows from number `first` on."""
        return np.stack([self._window(i) for i in range(first, first + count)]).astype(np.int64)

    def _window(self, index: int) -> npt.NDArray[np.uint32]:
        block, place = divmod(index, self._num_windows)
        assert block >= self._start.block, "a stream does not go back"
        while self._start.block < block:
            self._start = BlockStart(
                self._start.block + 1, self._before_batch, self._batch_tokens - len(self._rest)
            )
            self._read_block()
        return self._windows[place]

    def _read_block(self) -> None:
        num_tokens = self._num_windows * self._seq_len
        parts = [self._rest]
        # The last window ends with the token that the next block begins with.
        while sum(map(len, parts)) <= num_tokens:
            self._before_batch = self._documents.state()
            parts.append(self._read_batch())
        tokens = np.concatenate(parts)
        self._rest = tokens[num_tokens:].copy()
        generator = np.random.default_rng([*self._seed, self._start.block, 2])
        starts = generator.permutation(self._num_windows) * self._seq_len
        self._windows = [tokens[start : start + self._seq_len + 1] for start in starts]

    def _read_batch(self) -> npt.NDArray[np.uint32]:
        texts = self._documents.take(_DOCUMENTS_AT_ONCE)
        tokens = self._encoder.encode([Document("", text) for text in texts])
        self._batch_tokens = len(tokens)
        return tokens
