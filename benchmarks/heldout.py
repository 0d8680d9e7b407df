"""The bundled model's held-out text, cut into windows."""

from __future__ import annotations

from pathlib import Path

from colm_serve.model.vocabulary import load_model_tokenizer
from colm_serve.training.config import TrainConfig
from colm_serve.training.heldout import read_heldout

MODEL = Path(__file__).parent.parent / "models" / "stdlib-air"


def heldout_windows(num_windows: int, length: int) -> list[list[int]]:
    """So many windows of `length` tokens and the one after them, spread over the text."""
    config = TrainConfig.load(MODEL / "train.yaml")
    tokenizer = load_model_tokenizer(MODEL, config.model.vocab_size)
    tokens = read_heldout(config, tokenizer, None).tokens
    last = len(tokens) - length - 1
    starts = range(0, last, last // num_windows)
    return [tokens[start : start + length + 1].astype(int).tolist() for start in starts]
