"""The documents of the task beside this file: the bundled model's held-out files, cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from colm_serve.training.config import TrainConfig
from colm_serve.training.corpus import read_corpus

RECIPE = Path(__file__).parents[2] / "models" / "stdlib-air" / "train.yaml"
MAX_CHARACTERS = 4000


def load(**_: Any) -> dict[str, Dataset]:
    """The task's one split; the harness passes what it knows of the task."""
    recipe = TrainConfig.load(RECIPE)
    corpus = read_corpus(None, recipe.heldout_fraction, recipe.exclude)
    texts = [{"text": document.text[:MAX_CHARACTERS]} for document in corpus.heldout]
    return {"test": Dataset.from_list(texts)}
