"""The bundled model's held-out text, cut into windows."""

from __future__ import annotations

from pathlib import Path

from colm_serve.training.config import TrainConfig
from colm_serve.training.corpus import read_corpus
from colm_serve.training.tokenizer import encode_documents, load_tokenizer

MODEL = Path(__file__).parent.parent / "models" / "stdlib-air"


def heldout_windows(num_windows: int, length: int) -> list[list[int]]:
    """So many windows of `length` tokens and the one after them, spread over the text."""
    config = TrainConfig.load(MODEL / "train.yaml")
    corpus = read_corpus(None, config.heldout_fraction, config.exclude)
    tokens = encode_documents(load_tokenizer(MODEL), config.model, corpus, corpus.heldout)
    last = len(tokens) - length - 1
    starts = range(0, last, last // num_windows)
    return [tokens[start : start + length + 1].astype(int).tolist() for start in starts]
