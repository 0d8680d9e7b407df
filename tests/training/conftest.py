"""A corpus and a recipe small enough to train in a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from colm_serve.training.config import TrainConfig
from tests.training.runs import MODEL

NUM_FILES = 4
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
def rows_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face dataset of NUM_FILES files, in each a row without text worth reading."""
    # The library's locks, one for each dataset, must not stay in the home of who runs the tests.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in range(NUM_FILES):
        texts = [*(row_text(file, row) for row in range(60)), " "]
        rows = (json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
        (folder / f"train-{file}.jsonl").write_text("".join(rows), "utf-8")
    return folder


def row_text(file: int, row: int) -> str:
    n = 100 * file + row
    return f"def function_{n}(x):\n    return x * {n} + {n * n}\n" * (row % 3 + 1)


@pytest.fixture
def recipe() -> Callable[..., TrainConfig]:
    """The tiny recipe with some keys changed."""

    def make(**changes: object) -> TrainConfig:
        return replace(RECIPE, **changes)  # type: ignore[arg-type]

    return make
