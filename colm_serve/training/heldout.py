"""The part of a run's corpus that training never sees, as tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from colm_serve.errors import InvalidArgument
from colm_serve.training.config import TrainConfig
from colm_serve.training.corpus import Document, read_corpus
from colm_serve.training.document_encoder import DocumentEncoder
from colm_serve.training.streamed_corpus import StreamedCorpus

_DOCUMENTS_AT_ONCE = 32


@dataclass(frozen=True)
class Heldout:
    """Held-out documents in one stream of token ids."""

    corpus: str
    num_documents: int
    tokens: npt.NDArray[np.uint32]

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def read_heldout(config: TrainConfig, tokenizer: Tokenizer, data: Path | None) -> Heldout:
    """The held-out part of `data`, or else of the recipe's stream or default corpus.

    Raises:
        InvalidArgument: the corpus is missing, or too small; see `read_corpus`.
        InvalidConfig, Unavailable: see `StreamedCorpus`.
    """
    if config.stream is not None and data is None:
        corpus = StreamedCorpus(config.stream, config.text_field, config.heldout_fraction)
        encoder = DocumentEncoder(tokenizer, config.model, corpus.name)
        return read_streamed_heldout(corpus, encoder, config)
    folder = read_corpus(data, config.heldout_fraction, config.exclude, config.text_field)
    encoder = DocumentEncoder(tokenizer, config.model, folder.name)
    tokens = encoder.encode(folder.heldout)
    check_heldout(folder.name, len(tokens), config)
    return Heldout(folder.name, len(folder.heldout), tokens)


def read_streamed_heldout(
    corpus: StreamedCorpus, encoder: DocumentEncoder, config: TrainConfig
) -> Heldout:
    """The dataset's first held-out documents, as many as give `eval_tokens` tokens.

    Raises:
        InvalidArgument: they are too few for one sequence.
    """
    texts, parts = corpus.heldout(), []
    num_documents = num_tokens = 0
    while num_tokens < config.eval_tokens:
        batch = [Document("", text) for text in islice(texts, _DOCUMENTS_AT_ONCE)]
        if not batch:
            break
        parts.append(encoder.encode(batch))
        num_documents += len(batch)
        num_tokens += len(parts[-1])
    check_heldout(corpus.name, num_tokens, config)
    return Heldout(corpus.name, num_documents, np.concatenate(parts))


def check_heldout(name: str, num_tokens: int, config: TrainConfig) -> None:
    """Raise InvalidArgument unless the held-out tokens fill a sequence."""
    if num_tokens <= config.seq_len:
        allowed = (
            f"a corpus with more than seq_len, {config.seq_len}, held-out tokens; this one has "
            f"{num_tokens} at heldout_fraction {config.heldout_fraction}"
        )
        raise InvalidArgument("data", name, allowed)
