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

Item = TypeVar("Item", bound=Hashable)


@dataclass(order=True)
class _Waiting(Generic[Item]):
    deadline_s: float
    number: int  # of two with the same deadline the first to come goes first
    cost: float = field(compare=False)
    item: Item = field(compare=False)


@dataclass
class _Flow(Generic[Item]):
    """A tenant; `start` is the virtual time from which its next request is served."""

    weight: float
    start: float = 0.0
    waiting: list[_Waiting[Item]] = field(default_factory=list)


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
        if not flow.waiting:
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
        flow = self._next()
        return None if flow is None else flow.waiting[0].item

    def pop(self) -> Item:
        """Serve the head; its tenant has had its tokens.

        Raises:
            IndexError: nothing waits.
        """
        flow = self._next()
        if flow is None:
            raise IndexError("nothing waits")
        place = flow.waiting[0]
        self.remove(place.item)
        self._serve(flow, place.cost)
        return place.item

    def serve_at_once(self, tenant: str, cost: float) -> None:
        """An item of this tenant was served without waiting, as nothing waited."""
        self._serve(self._flows[tenant], cost)

    def remove(self, item: Item) -> None:
        """The item waits no more, if it did; its tenant has had nothing for it."""
        if item in self._places:
            flow, place = self._places.pop(item)
            del flow.waiting[bisect_left(flow.waiting, place)]

    def _next(self) -> _Flow[Item] | None:
        flows = (flow for flow in self._flows.values() if flow.waiting)
        return min(flows, key=lambda flow: flow.start, default=None)

    def _serve(self, flow: _Flow[Item], cost: float) -> None:
        self._now = max(self._now, flow.start)
        flow.start = self._now + cost / flow.weight
