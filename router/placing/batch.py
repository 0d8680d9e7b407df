"""The rows of one decode worker, as they are and as they would be after some moves. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from colm_serve.core import StepCost
from colm_serve.router.placing.outlook import Departures, Outlook


@dataclass(frozen=True)
class Row:
    """A running request: its level, the bounds it may move in, and what its tokens may take.

    It keeps its targets if its next `num_left` tokens, the most that may come, take `mean_limit_s`
    on average. Those of less `weight` go down first.
    """

    request_id: str
    level: int
    min_level: int
    max_level: int
    num_attended: int
    num_left: int = 0
    mean_limit_s: float = math.inf
    tpot_s: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Move:
    request_id: str
    level: int
    is_up: bool


class Batch:
    """Rows, the levels that some of them are moved to, and what a token takes each then."""

    def __init__(self, rows: Sequence[Row], cost: StepCost, max_rows: int) -> None:
        self.rows = rows
        self.levels = [row.level for row in rows]
        self._moved: set[int] = set()
        self._max_rows = max_rows
        # More rows than a step holds take turns.
        self._turns = max(1.0, len(rows) / max_rows)
        self.cost = cost
        self.num_chains = len(cost.chain_s)
        self._num_rows = [0] * self.num_chains
        self._num_attended = [0] * self.num_chains
        for row in rows:
            for chain in range(min(row.level, self.num_chains)):
                self._num_rows[chain] += 1
                self._num_attended[chain] += row.num_attended
        self._chain_s = [self._step_s(chain) for chain in range(self.num_chains)]

    @property
    def token_s(self) -> float:
        """Seconds from token to token."""
        return self.seconds(self.num_chains)

    def seconds(self, level: int) -> float:
        """The part of the chains up to a level."""
        return self._turns * sum(self._chain_s[:level])

    @property
    def moves(self) -> list[Move]:
        changed = ((self.rows[i], self.levels[i]) for i in sorted(self._moved))
        return [Move(row.request_id, level, level > row.level) for row, level in changed]

    def may_move(self, index: int, num_moves: int) -> bool:
        """Whether that needs no more than so many moves in all."""
        return index in self._moved or len(self._moved) < num_moves

    def move(self, index: int, step: int) -> None:
        """Put a row a level up, or with -1 down."""
        row, level = self.rows[index], self.levels[index] + step
        chain = max(level, self.levels[index]) - 1
        self._num_rows[chain] += step
        self._num_attended[chain] += step * row.num_attended
        self._chain_s[chain] = self._step_s(chain)
        self.levels[index] = level
        (self._moved.discard if level == row.level else self._moved.add)(index)

    def outlook(self) -> Outlook:
        """What they leave to newcomers."""
        departures = self._departures()
        limits = [row.mean_limit_s + departures.mean_saving_s(row.num_left) for row in self.rows]
        targets = [row.tpot_s for row in self.rows if row.tpot_s is not None]
        return Outlook(min(limits, default=math.inf), min(targets, default=None), departures)

    def _departures(self) -> Departures:
        """Rows that use a chain have equal shares of it, but for what it takes however many do."""
        share_s, last = [0.0], [0] * self.num_chains
        for chain, num_rows in enumerate(self._num_rows):
            shared_s = self._turns * (self._chain_s[chain] - self.cost.chain_s[chain])
            share_s.append(share_s[-1] + (shared_s / num_rows if num_rows else 0.0))
        parts = []
        for row, level in zip(self.rows, self.levels, strict=True):
            highest = min(level, self.num_chains)
            parts.append((row.num_left, share_s[highest]))
            last[highest - 1] = max(last[highest - 1], row.num_left)
        num_left = 0
        for chain in reversed(range(self.num_chains)):
            num_left = max(num_left, last[chain])
            if self._num_rows[chain]:
                parts.append((num_left, self._turns * self.cost.chain_s[chain]))
        return Departures(parts)

    def _step_s(self, chain: int) -> float:
        num_rows = min(self._num_rows[chain], self._max_rows)
        return self.cost.chain_step_s(chain, num_rows, self._num_attended[chain] / self._turns)
