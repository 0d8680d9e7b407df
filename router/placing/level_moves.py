"""Which running requests change their level: down while targets are missed, up while there is room.

Pure; time is an argument. Nothing flaps: a request goes up only where a step would stay well below
what the targets allow, and goes down only once it is above. In between nobody moves, and for a
while after somebody went down nobody goes up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from colm_serve.core import StepCost
from colm_serve.router.placing.latency_model import AIMED_SHARE, upper_limit_s

#: From one look at the running requests to the next.
INTERVAL_S = 0.25
#: What is left of a target to one who has been slow, however slow: see `step_limit_s`.
LEAST_SHARE = 0.8
#: Nobody goes up to where a step would take more of what is allowed.
_ROOM_SHARE = 0.8
#: For so long after a move down nobody goes up.
_HOLD_S = 2.0
#: Moves that may be saved up, in seconds of their rate.
_BURST_S = 1.0


@dataclass(frozen=True)
class Row:
    """A running request: its level, the bounds it may move in, and what a step may take.

    `step_limit_s` is the longest step with which it keeps its targets. Those of less `weight` go
    down first.
    """

    request_id: str
    level: int
    min_level: int
    max_level: int
    num_attended: int
    step_limit_s: float = math.inf
    weight: float = 1.0


@dataclass(frozen=True)
class Move:
    request_id: str
    level: int
    is_up: bool


def step_limit_s(
    *,
    tpot_s: float | None,
    decode_s: float,
    num_done: int,
    num_left: int,
    remaining_s: float,
) -> float:
    """The longest step with which a request keeps its targets, with some to spare.

    Who has been slower than `tpot_s` has less than others, to catch up; who has been faster has no
    more. All that is left has to come before the deadline.

    Args:
        decode_s: since the first token.
        num_done: tokens that came after the first one.
        num_left: tokens still to come, at most.
        remaining_s: until the deadline.
    """
    limit_s = math.inf if num_left <= 0 else max(0.0, remaining_s) / num_left
    if tpot_s is None:
        return limit_s
    catching_up_s = (tpot_s * (num_done + num_left) - decode_s) / max(1, num_left)
    return min(limit_s, AIMED_SHARE * tpot_s, max(catching_up_s, LEAST_SHARE * tpot_s))


class _Batch:
    """Rows as they would be after some moves, and what a token would take each of them."""

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
        self._chain_s = [self._seconds(chain) for chain in range(self.num_chains)]

    @property
    def token_s(self) -> float:
        return self._turns * sum(self._chain_s)

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
        self._chain_s[chain] = self._seconds(chain)
        self.levels[index] = level
        (self._moved.discard if level == row.level else self._moved.add)(index)

    def _seconds(self, chain: int) -> float:
        num_rows = min(self._num_rows[chain], self._max_rows)
        return self.cost.chain_step_s(chain, num_rows, self._num_attended[chain] / self._turns)


class LevelMover:
    """Plans one decode worker's moves, at most `moves_per_s` of them."""

    def __init__(self, moves_per_s: float) -> None:
        self._moves_per_s = moves_per_s
        self._saved = min(1.0, moves_per_s)
        self._planned_at: float | None = None
        self._lowered_at = -math.inf

    def plan(self, now: float, rows: Sequence[Row], cost: StepCost, max_rows: int) -> list[Move]:
        """The moves to make now; `now` never goes back."""
        since_s = 0.0 if self._planned_at is None else now - self._planned_at
        self._planned_at = now
        most = max(1.0, self._moves_per_s * _BURST_S)
        self._saved = min(most, self._saved + since_s * self._moves_per_s)
        batch = _Batch(rows, cost, max_rows)
        limit_s = min((row.step_limit_s for row in rows), default=math.inf)
        if batch.token_s > limit_s:
            _lower(batch, limit_s, int(self._saved))
            if batch.moves:
                self._lowered_at = now
        elif now - self._lowered_at >= _HOLD_S:
            _raise(batch, limit_s, int(self._saved))
        self._saved -= len(batch.moves)
        return batch.moves


def _lower(batch: _Batch, limit_s: float, num_moves: int) -> None:
    """Take rows off the highest chain, then off the one below it, until a step is short enough.

    A chain costs most as long as anybody uses it. Among those at a level the lightest go first,
    then those in the greatest hurry.
    """
    rows = batch.rows
    order = sorted(range(len(rows)), key=lambda i: (rows[i].weight, rows[i].step_limit_s))
    for level in range(batch.num_chains, 1, -1):
        for i in order:
            if batch.token_s <= limit_s:
                return
            is_free = batch.levels[i] == level > rows[i].min_level
            if is_free and batch.may_move(i, num_moves):
                batch.move(i, -1)


def _raise(batch: _Batch, limit_s: float, num_moves: int) -> None:
    """Put rows on the next chain, from the lowest on, as long as a step stays well below the limit.

    Among those at a level the heaviest go first.
    """
    rows = batch.rows
    order = sorted(range(len(rows)), key=lambda i: -rows[i].weight)
    for level in range(1, batch.num_chains):
        most_s = min(_ROOM_SHARE * limit_s, upper_limit_s(limit_s, level + 1, batch.cost))
        for i in order:
            is_free = batch.levels[i] == level < rows[i].max_level
            if is_free and batch.may_move(i, num_moves):
                batch.move(i, 1)
                if batch.token_s > most_s:
                    batch.move(i, -1)
                    break
