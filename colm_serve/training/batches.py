"""The sequences of each step: a function of recipe, corpus, step and place in the step alone, so
resumed runs and other numbers of processes agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from colm_serve.errors import InvalidArgument
from colm_serve.training.config import TrainConfig
from colm_serve.training.document_encoder import DocumentEncoder
from colm_serve.training.streamed_corpus import StreamedCorpus
from colm_serve.training.token_stream import TokenStream

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class Batches(Protocol):
    """Where a run's sequences come from."""

    def micro_batch(self, step: int, index: int) -> npt.NDArray[np.int64]:
        """Token ids [sequences_per_micro_batch, seq_len + 1] of the `index`-th micro-batch of step
        `step`, both counted from 0; steps are asked for in their order.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this process's part, by a name; plain values."""


class StoredBatches:
    """Sequences of a corpus whose tokens are all there.

    Every epoch cuts the tokens into windows at a shift of its own and shuffles them.
    """

    def __init__(self, tokens: TokenArray, config: TrainConfig) -> None:
        self._tokens = tokens
        self._config = config
        self._size = config.sequences_per_micro_batch
        self._num_windows = (len(tokens) - 1) // config.seq_len - 1
        if self._num_windows < 1:
            raise InvalidArgument(
                "data",
                f"{len(tokens)} tokens",
                f"a corpus of more than {2 * config.seq_len} tokens, two of seq_len",
            )
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def micro_batch(self, step: int, index: int) -> npt.NDArray[np.int64]:
        first = step * self._config.sequences_per_step + index * self._size
        return np.stack([self._window(i) for i in range(first, first + self._size)])

    def state(self) -> dict[str, Any]:
        return {}

    def _window(self, index: int) -> npt.NDArray[np.int64]:
        epoch, place = divmod(index, self._num_windows)
        start = self._starts(epoch)[place]
        return self._tokens[start : start + self._config.seq_len + 1].astype(np.int64)

    def _starts(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([self._config.seed, epoch])
            shift = generator.integers(self._config.seq_len)
            starts = generator.permutation(self._num_windows) * self._config.seq_len + shift
            self._epoch = (epoch, starts)
        return self._epoch[1]


class StreamedBatches:
    """Sequences of a corpus that is read as they are asked for.

    The dataset's files are split into lanes, the more the better up to one a micro-batch: a
    process reads only the lanes that its micro-batches are of.

    Args:
        states: what `state` said in every process when the run was interrupted.
    """

    def __init__(
        self,
        corpus: StreamedCorpus,
        encoder: DocumentEncoder,
        config: TrainConfig,
        states: Mapping[str, Any],
    ) -> None:
        self._corpus, self._encoder, self._config = corpus, encoder, config
        self._states = states
        self._num_lanes = math.gcd(corpus.num_shards, config.num_micro_batches)
        self._lanes: dict[int, TokenStream] = {}

    def micro_batch(self, step: int, index: int) -> npt.NDArray[np.int64]:
        row, lane = divmod(index, self._num_lanes)
        size = self._config.sequences_per_micro_batch
        first = (step * (self._config.num_micro_batches // self._num_lanes) + row) * size
        if lane not in self._lanes:
            self._lanes[lane] = self._open(lane)
        return self._lanes[lane].windows(first, size)

    def state(self) -> dict[str, Any]:
        return {str(lane): stream.state for lane, stream in self._lanes.items()}

    def _open(self, lane: int) -> TokenStream:
        return TokenStream(
            self._corpus.share(self._num_lanes, lane),
            self._encoder,
            self._config,
            lane,
            self._states.get(str(lane)),
        )
