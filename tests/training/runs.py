"""What tests of whole training runs share."""

from __future__ import annotations

from pathlib import Path

from colm_serve.model.config import ColmConfig
from colm_serve.training.metrics import read_metrics
from colm_serve.training.stop_signal import StopSignal

MODEL = ColmConfig(
    vocab_size=280,
    chains=(1, 1, 2),
    d_model=32,
    d_ff=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    max_context=64,
    tie_embeddings=True,
)


def losses(run_folder: Path) -> dict[int, float]:
    """The loss of each step that the run has logged."""
    rows = read_metrics(run_folder / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


class StopAfter(StopSignal):
    """Asks for a stop once the loop has looked `num_looks` times."""

    def __init__(self, num_looks: int) -> None:
        self._looks_left = num_looks
        super().__init__()

    @property
    def requested(self) -> bool:
        self._looks_left -= 1
        return self._looks_left < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        """The base class starts with False."""
