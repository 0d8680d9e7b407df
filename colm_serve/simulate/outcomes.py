"""What became of the requests of a trace, kept in a few bytes each, and the figures of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colm_serve.config import SlaClass

PERCENTILES = (50, 90, 99)


@dataclass(eq=False)
class ClassOutcomes:
    """Those of one SLA class; times in milliseconds, in order of completion."""

    sla: SlaClass
    ttft_ms: array[float] = field(default_factory=lambda: array("f"))
    tpot_ms: array[float] = field(default_factory=lambda: array("f"))
    num_met: int = 0
    num_refused: int = 0
    num_late: int = 0
    num_tokens: int = 0
    level_tokens: float = 0.0

    @property
    def num_requests(self) -> int:
        return len(self.ttft_ms) + self.num_refused + self.num_late

    def finished(
        self, ttft_s: float, tpot_s: float | None, num_tokens: int, mean_level: float
    ) -> None:
        """All tokens have come; with a single one there is no time between two."""
        ttft_ms = ttft_s * 1e3
        tpot_ms = None if tpot_s is None else tpot_s * 1e3
        self.ttft_ms.append(ttft_ms)
        if tpot_ms is not None:
            self.tpot_ms.append(tpot_ms)
        self.num_tokens += num_tokens
        self.level_tokens += mean_level * num_tokens
        self.num_met += _is_within(ttft_ms, self.sla.ttft_ms) and _is_within(
            tpot_ms, self.sla.tpot_ms
        )


def _is_within(value: float | None, target: float | None) -> bool:
    return value is None or target is None or value <= target


@dataclass(frozen=True)
class Figures:
    """Of some requests; percentiles in milliseconds by `PERCENTILES`, None where none finished.

    `attainment` is the share of all requests, refused ones included, that kept their SLA.
    """

    num_requests: int
    num_refused: int
    num_late: int
    ttft_ms: tuple[float, ...] | None
    tpot_ms: tuple[float, ...] | None
    attainment: float
    goodput_per_s: float
    mean_level: float | None

    @classmethod
    def of(cls, classes: Sequence[ClassOutcomes], duration_s: float) -> Figures:
        num_requests = sum(c.num_requests for c in classes)
        num_met = sum(c.num_met for c in classes)
        num_tokens = sum(c.num_tokens for c in classes)
        return cls(
            num_requests=num_requests,
            num_refused=sum(c.num_refused for c in classes),
            num_late=sum(c.num_late for c in classes),
            ttft_ms=_percentiles([c.ttft_ms for c in classes]),
            tpot_ms=_percentiles([c.tpot_ms for c in classes]),
            attainment=num_met / num_requests if num_requests else 1.0,
            goodput_per_s=num_met / duration_s if duration_s else 0.0,
            mean_level=sum(c.level_tokens for c in classes) / num_tokens if num_tokens else None,
        )


def _percentiles(values: Sequence[array[float]]) -> tuple[float, ...] | None:
    joined = joined_values(values)
    if not len(joined):
        return None
    return tuple(float(v) for v in np.percentile(joined, PERCENTILES))


def joined_values(values: Sequence[array[float]]) -> NDArray[np.float32]:
    return np.concatenate(
        [np.frombuffer(v, np.float32) for v in values if v] or [np.empty(0, np.float32)]
    )


@dataclass(frozen=True)
class Outcome:
    """A whole simulation: its requests by class, and what they took."""

    classes: dict[str, ClassOutcomes]
    duration_s: float
    num_workers: int
    tokens_by_level: tuple[int, ...]
    num_preemptions: int
    num_level_moves: int = 0

    @property
    def total(self) -> Figures:
        return Figures.of(tuple(self.classes.values()), self.duration_s)

    @property
    def by_class(self) -> dict[str, Figures]:
        """Of the classes that had requests."""
        return {
            name: Figures.of((outcomes,), self.duration_s)
            for name, outcomes in self.classes.items()
            if outcomes.num_requests
        }

    @property
    def worker_s_per_1000_tokens(self) -> float | None:
        """The cost: seconds of all workers, busy or not."""
        num_tokens = sum(self.tokens_by_level)
        return self.num_workers * self.duration_s * 1000 / num_tokens if num_tokens else None

    def as_json(self) -> dict[str, Any]:
        return {
            "duration_s": self.duration_s,
            "num_workers": self.num_workers,
            "percentiles": PERCENTILES,
            "total": asdict(self.total),
            "classes": {name: asdict(figures) for name, figures in self.by_class.items()},
            "tokens_by_level": self.tokens_by_level,
            "num_preemptions": self.num_preemptions,
            "num_level_moves": self.num_level_moves,
            "worker_s_per_1000_tokens": self.worker_s_per_1000_tokens,
        }
