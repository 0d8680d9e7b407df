"""The highest rate that is kept, and every rate that was tried to find it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from colm_serve.simulate.outcomes import Figures

ATTAINMENT = 0.9
STRIDE = 1.5


@dataclass(frozen=True)
class Point:
    """What became of the trace at one rate."""

    rate_per_s: float
    figures: Figures

    @property
    def is_kept(self) -> bool:
        return self.figures.attainment >= ATTAINMENT


@dataclass(frozen=True)
class Goodput:
    """Every rate that was tried with one policy."""

    points: tuple[Point, ...]

    @property
    def best(self) -> Point | None:
        """The highest rate below which none was missed."""
        lowest_missed = min((p.rate_per_s for p in self.points if not p.is_kept), default=math.inf)
        kept = [p for p in self.points if p.is_kept and p.rate_per_s < lowest_missed]
        return max(kept, key=lambda point: point.rate_per_s, default=None)

    @property
    def rate_per_s(self) -> float:
        return 0.0 if self.best is None else self.best.rate_per_s

    @property
    def mean_level(self) -> float:
        return 0.0 if self.best is None else self.best.figures.mean_level or 0.0


def find_goodput(play: Callable[[float], Figures], first: float, num_halvings: int) -> Goodput:
    """Go up or down from `first` until a rate is kept and one missed, then bisect."""
    points: list[Point] = []

    def is_kept(rate: float) -> bool:
        points.append(Point(rate, play(rate)))
        return points[-1].is_kept

    low = high = first
    if is_kept(first):
        while is_kept(high := high * STRIDE):
            low = high
    else:
        while not is_kept(low := low / STRIDE) and low > first / 64:
            high = low
    for _ in range(num_halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if is_kept(middle) else (low, middle)
    return Goodput(tuple(points))
