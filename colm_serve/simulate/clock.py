"""Virtual time: events in order, each at once after the one before."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable
from typing import Any

Event = tuple[float, int, Callable[..., object], tuple[Any, ...]]

_SLOTS_PER_S = 1000


class VirtualClock:
    """Runs actions at their times; those of one time in the order in which they were set.

    A calendar queue: events lie unsorted in slots of a millisecond until the slot's time has come.
    A heap of thousands of them would be looked at from top to bottom for each.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._num_set = 0
        self._slot = -1
        self._events: list[Event] = []  # of the slot, and so many of them done
        self._num_done = 0
        self._later: dict[int, list[Event]] = {}
        self._later_slots: list[int] = []

    def at(self, time: float, action: Callable[..., object], *arguments: Any) -> None:
        """Run `action(*arguments)` when the clock shows `time`, which is not past."""
        self._num_set += 1
        event = (time, self._num_set, action, arguments)
        slot = int(time * _SLOTS_PER_S)
        if slot == self._slot:
            insort(self._events, event, lo=self._num_done)
        elif (events := self._later.get(slot)) is not None:
            events.append(event)
        else:
            self._later[slot] = [event]
            heapq.heappush(self._later_slots, slot)

    def step(self) -> bool:
        """Run the next action; False: none is set."""
        if self._num_done == len(self._events) and not self._turn_to_next_slot():
            return False
        self.now, _, action, arguments = self._events[self._num_done]
        self._num_done += 1
        action(*arguments)
        return True

    def run(self) -> None:
        """Until nothing is set any more."""
        while self.step():
            pass

    def _turn_to_next_slot(self) -> bool:
        """Sort the events of the next slot that has any; False: there is none."""
        if not self._later_slots:
            return False
        self._slot = heapq.heappop(self._later_slots)
        self._events = sorted(self._later.pop(self._slot))
        self._num_done = 0
        return True
