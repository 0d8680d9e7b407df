"""Whose turn it is: start-time fair queueing among tenants, deadlines within each. Pure.

Goyal, Vin and Cheng, "Start-time Fair Queueing" (SIGCOMM 1996): tenants that wait get tokens in
proportion to their weights, to within one request of each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

#: Items that are aside at a time: each is tried anew at every change.
MAX_ASIDE = 4

Item = TypeVar("Item", bound=Hashable)


@dataclass(order=True)
class _Waiting(Generic[Item]):
    deadline_s: float
    number: int  # of two with the same deadline the first to come goes first
    cost: float = field(compare=False)
    item: Item = field(compare=False)
    is_aside: bool = field(default=False, compare=False)


@dataclass
class _Flow(Generic[Item]):
    """A tenant; `start` is the virtual time from which its next request is served."""

    weight: float
    start: float = 0.0
    waiting: list[_Waiting[Item]] = field(default_factory=list)

    def first(self) -> _Waiting[Item] | None:
        return next((place for place in self.waiting if not place.is_aside), None)


class FairQueue(Generic[Item]):
    """At most `max_queued` items wait.

    When there are more, the tenant with the most for its weight loses the one that is due last.
    """

    def __init__(self, max_queued: int, weights: Mapping[str, float]) -> None:
        self._max_queued = max_queued
        self._flows: dict[str, _Flow[Item]] = {n: _Flow(weight) for n, weight in weights.items()}
        self._places: dict[Item, tuple[_Flow[Item], _Waiting[Item]]] = {}
        self._numbers = count()
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._places)

    def num_waiting(self, tenant: str) -> int:
        return len(self._flows[tenant].waiting)

    def push(self, tenant: str, cost: float, deadline_s: float, item: Item) -> Item | None:
        """Let an item wait; returns the one that had to go for it, which may be the same.

        Args:
            cost: tokens that serving it is thought to take.
        """
        flow = self._flows[tenant]
        if flow.first() is None:
            flow.start = max(flow.start, self._now)
        place = _Waiting(deadline_s, next(self._numbers), cost, item)
        insort(flow.waiting, place)
        self._places[item] = (flow, place)
        if len(self) <= self._max_queued:
            return None
        greatest = max(self._flows.values(), key=lambda f: (len(f.waiting) / f.weight, f is flow))
        last = greatest.waiting[-1].item
        self.remove(last)
        return last

    def head(self) -> Item | None:
        """The next item to serve; another may come before it until it is popped."""
        first = self._first()
        return None if first is None else first.item

    def pop(self) -> Item:
        """Serve the head; its tenant has had its tokens.

        Raises:
            IndexError: nothing waits.
        """
        first = self._first()
        if first is None:
            raise IndexError("nothing waits")
        flow, _ = self._places[first.item]
        self.remove(first.item)
        self._serve(flow, first.cost)
        return first.item

    def set_aside(self, item: Item) -> None:
        """The item lets others by until it is recalled."""
        self._places[item][1].is_aside = True

    def recall(self, item: Item) -> None:
        """The item has its place again, if it still waits; its tenant is owed nothing for it."""
        if item in self._places:
            flow, place = self._places[item]
            if flow.first() is None:
                flow.start = max(flow.start, self._now)
            place.is_aside = False

    def serve_at_once(self, tenant: str, cost: float) -> None:
        """An item of this tenant was served without waiting, as nothing waited."""
        self._serve(self._flows[tenant], cost)

    def remove(self, item: Item) -> None:
        """The item waits no more, if it did; its tenant has had nothing for it."""
        if item in self._places:
            flow, place = self._places.pop(item)
            del flow.waiting[bisect_left(flow.waiting, place)]

    def _first(self) -> _Waiting[Item] | None:
        flows = [(flow.start, first) for flow in self._flows.values() if (first := flow.first())]
        return min(flows, key=lambda pair: pair[0], default=(0.0, None))[1]

    def _serve(self, flow: _Flow[Item], cost: float) -> None:
        self._now = max(self._now, flow.start)
        flow.start = self._now + cost / flow.weight
