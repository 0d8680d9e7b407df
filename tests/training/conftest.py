"""A corpus and a recipe small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colm_serve.training.config import TrainConfig
from tests.training.runs import MODEL

RECIPE = TrainConfig(
    model=MODEL,
    num_steps=12,
    seed=7,
    seq_len=32,
    sequences_per_step=4,
    sequences_per_micro_batch=2,
    peak_lr=1e-2,
    warmup_steps=2,
    lower_levels=1,
    precision="fp32",
    heldout_fraction=0.2,
    eval_interval_steps=5,
    eval_tokens=64,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Exact sums must not depend on how many cores the machine lends."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """40 files that look alike and differ."""
    folder = tmp_path / "corpus"
    for i in range(40):
        path = folder / f"package_{i % 4}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{i}(x):\n    return x * {i} + {i * i}\n" * 12, "utf-8")
    return folder


@pytest.fixture
def recipe() -> Callable[..., TrainConfig]:
    """The tiny recipe with some keys changed."""

    def make(**changes: object) -> TrainConfig:
        return replace(RECIPE, **changes)  # type: ignore[arg-type]

    return make
