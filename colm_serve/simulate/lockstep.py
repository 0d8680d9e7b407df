"""Rows that take part in every step, so that counts tell how long they and the steps are.

The counts change only when a row comes, goes or moves: until then any number of steps is one sum.
"""

from __future__ import annotations

import heapq
from operator import mul

from colm_serve.core import StepCost
from colm_serve.simulate.sequence import VirtualSequence


class Lockstep:
    """Rows that all take part in every step, each until it ends or has filled its pages."""

    def __init__(self, num_levels: int, page_size: int) -> None:
        self.num_steps = 0
        self._page_size = page_size
        self.rows_per_chain = [0] * num_levels
        self._cached_per_chain = [0] * num_levels
        self._events: list[tuple[int, int, VirtualSequence]] = []

    def __len__(self) -> int:
        return self.rows_per_chain[0]

    def join(self, sequence: VirtualSequence) -> None:
        """It takes part from the next step on; its pages have room for that."""
        sequence.is_in_lockstep = True
        sequence.at_step = self.num_steps
        self.count(sequence, sequence.level, 1)
        self.expect(sequence)

    def expect(self, sequence: VirtualSequence) -> None:
        """Note when the row ends or, before that, has filled its pages."""
        num_slots = sequence.holding.num_pages * self._page_size
        num_left = min(
            sequence.max_length - sequence.num_tokens, num_slots - sequence.num_tokens + 1
        )
        sequence.event_step = self.num_steps + num_left
        heapq.heappush(self._events, (sequence.event_step, sequence.age, sequence))

    def leave(self, sequence: VirtualSequence) -> None:
        self.look(sequence)
        self.count(sequence, sequence.level, -1)
        sequence.is_in_lockstep = False
        sequence.event_step = None  # what is noted of it is void

    def move(self, sequence: VirtualSequence, level: int) -> None:
        self.look(sequence)
        self.count(sequence, sequence.level, -1)
        self.count(sequence, level, 1)
        sequence.set_level(level)

    def look(self, sequence: VirtualSequence) -> None:
        """Bring its number of tokens up to date."""
        sequence.num_tokens += self.num_steps - sequence.at_step
        sequence.at_step = self.num_steps

    def num_steps_ahead(self) -> int:
        """Steps until the next row ends or wants a page; there has to be a row."""
        events = self._events
        while events[0][2].event_step != events[0][0]:
            heapq.heappop(events)
        return events[0][0] - self.num_steps

    def advance(self, num_steps: int) -> list[VirtualSequence]:
        """Take steps; returns the rows, up to date, that end with them or want a page."""
        self.num_steps += num_steps
        counts = zip(self._cached_per_chain, self.rows_per_chain, strict=True)
        self._cached_per_chain = [cached + num_steps * rows for cached, rows in counts]
        due = []
        while self._events and self._events[0][0] <= self.num_steps:
            step, _, sequence = heapq.heappop(self._events)
            if sequence.event_step == step:
                sequence.event_step = None
                self.look(sequence)
                due.append(sequence)
        return due

    def attended_by_level(self, num_steps: int) -> list[int]:
        """Tokens that the rows of each level attend to once so many further steps are taken."""
        rows, cached = by_level(self.rows_per_chain), by_level(self._cached_per_chain)
        return [c + num_steps * r for c, r in zip(cached, rows, strict=True)]

    def step_s(self, cost: StepCost) -> tuple[float, float]:
        """Seconds of the next step, and how many more the one after it takes."""
        rows = self.rows_per_chain
        growth_s: float = sum(map(mul, cost.cached_token_s, rows))
        return cost.step_s(rows, self._cached_per_chain), growth_s

    def count(self, sequence: VirtualSequence, level: int, sign: int) -> None:
        for chain in range(level):
            self.rows_per_chain[chain] += sign
            self._cached_per_chain[chain] += sign * sequence.num_tokens


def by_level(per_chain: list[int]) -> list[int]:
    """Level 1 first: those that use its chain and not the next one."""
    return [upper - lower for upper, lower in zip(per_chain, [*per_chain[1:], 0], strict=True)]
