"""Virtual time: events in order, each at once after the one before."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class VirtualClock:
    """Runs actions at their times; those of one time in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        self._num_set = 0
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []

    def at(self, time: float, action: Callable[..., object], *arguments: Any) -> None:
        """Run `action(*arguments)` when the clock shows `time`, which is not past."""
        self._num_set += 1
        heapq.heappush(self._events, (time, self._num_set, action, arguments))

    def step(self) -> bool:
        """Run the next action; False: none is set."""
        if not self._events:
            return False
        self.now, _, action, arguments = heapq.heappop(self._events)
        action(*arguments)
        return True

    def run(self) -> None:
        """Until nothing is set any more."""
        events, next_event = self._events, heapq.heappop
        while events:
            self.now, _, action, arguments = next_event(events)
            action(*arguments)
