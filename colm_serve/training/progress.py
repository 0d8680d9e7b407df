"""What a person watching a run sees: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from colm_serve.training.config import TrainConfig
from colm_serve.training.loss import LevelLoss

_LINE_INTERVAL_S = 30.0
#: Weight of the newest step in the shown averages.
_SMOOTHING = 0.05


class Progress:
    """Shows step, loss, speed and time left."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        self._config = config
        self._console = Console()
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s  ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "train", total=config.num_steps, completed=step, loss=float("nan"), speed=0.0
        )
        self._averages: tuple[float, float] | None = None
        self._last_line_at = float("-inf")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, loss: float, elapsed_s: float) -> None:
        """Step `step` is done."""
        if self._averages is None:
            self._averages = (loss, elapsed_s)
        mean_loss, mean_s = self._averages
        mean_loss += _SMOOTHING * (loss - mean_loss)
        mean_s += _SMOOTHING * (elapsed_s - mean_s)
        self._averages = (mean_loss, mean_s)
        speed = self._config.tokens_per_step / mean_s
        self._bar.update(self._task, completed=step, loss=mean_loss, speed=speed)
        is_last = step == self._config.num_steps
        due = time.monotonic() - self._last_line_at >= _LINE_INTERVAL_S
        if not self._console.is_terminal and (due or is_last):
            self._last_line_at = time.monotonic()
            minutes_left = (self._config.num_steps - step) * mean_s / 60
            self._print(
                f"step {step}/{self._config.num_steps}  loss {mean_loss:.3f}  "
                f"{speed:.0f} tokens/s  {minutes_left:.1f} min left"
            )

    def show_heldout(self, step: int, losses: Sequence[LevelLoss]) -> None:
        """Held-out loss at `step`."""
        shown = "  ".join(f"level {loss.level} {loss.nats_per_token:.3f}" for loss in losses)
        self._print(f"step {step}  held out: {shown}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
