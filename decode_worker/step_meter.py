"""Times a decode worker's steps; what they show is worked out only when it is asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from colm_serve.core import StepCost
from colm_serve.latency.step_fit import StepFit

#: Steps kept for the next time somebody asks; those after them are not looked at.
MAX_PENDING = 64


class _Step(NamedTuple):
    rows_per_chain: list[int]
    cached_tokens_per_chain: list[int]
    seconds: float


class StepMeter:
    """The step cost measured at the start, refined by real steps; thread-safe."""

    def __init__(self, measured: StepCost) -> None:
        self._num_chains = len(measured.chain_s)
        self._fit = StepFit(measured)
        self._pending: deque[_Step] = deque()
        self._fitting = threading.Lock()
        self._is_disturbed = False

    def note(self, rows: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step has been computed: of each row, its level and the tokens that it attends to."""
        # Fitting keeps the interpreter busy, which these steps waited for.
        was_disturbed, self._is_disturbed = self._is_disturbed, self._fitting.locked()
        if was_disturbed or self._is_disturbed or len(self._pending) >= MAX_PENDING:
            return
        counts, cached = [0] * self._num_chains, [0] * self._num_chains
        for level, num_cached in rows:
            counts[level - 1] += 1
            cached[level - 1] += num_cached
        # Rows use their level's chain and those below it.
        for chain in range(self._num_chains - 2, -1, -1):
            counts[chain] += counts[chain + 1]
            cached[chain] += cached[chain + 1]
        self._pending.append(_Step(counts, cached, seconds))

    def cost(self) -> StepCost:
        """What the steps so far show."""
        with self._fitting:
            while self._pending:
                self._fit.observe(*self._pending.popleft())
            return self._fit.cost
