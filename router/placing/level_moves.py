"""Which running requests change their level: down as room runs out, up while there is plenty.

Pure; time is an argument. Nothing flaps: a request goes up only where a step would stay well below
what is allowed at its new level, and goes down only once it is above. In between nobody moves, and
for a while after somebody went down nobody goes up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from colm_serve.core import StepCost
from colm_serve.router.placing.batch import Batch, Move, Row
from colm_serve.router.placing.latency_model import AIMED_TPOT_SHARE, upper_limit_s
from colm_serve.router.placing.outlook import Outlook

#: From one look at the running requests to the next.
INTERVAL_S = 0.25
#: What is left of a target to one who has been slow, however slow: see `mean_limit_s`.
LEAST_SHARE = 0.8
#: Nobody goes up to where a step would take more of what is allowed.
_ROOM_SHARE = 0.8
#: For so long after a move down nobody goes up.
_HOLD_S = 2.0
#: Moves that may be saved up, in seconds of their rate.
_BURST_S = 1.0


class Plan(NamedTuple):
    """The moves to make now, and what the rows left to newcomers before them."""

    moves: list[Move]
    outlook: Outlook


def mean_limit_s(
    *,
    tpot_s: float | None,
    decode_s: float,
    num_done: int,
    num_left: int,
    remaining_s: float,
) -> float:
    """What the tokens to come may take on average for a request to keep its targets.

    Who has been slower than `tpot_s` has less than others, to catch up, and who has been faster has
    more. All that is left has to come before the deadline.

    Args:
        decode_s: since the first token.
        num_done: tokens that came after the first one.
        num_left: tokens still to come, at most.
        remaining_s: until the deadline.
    """
    if num_left <= 0:
        return math.inf
    limit_s = max(0.0, remaining_s) / num_left
    if tpot_s is None:
        return limit_s
    aimed_s = AIMED_TPOT_SHARE * tpot_s
    own_s = (aimed_s * (num_done + num_left) - decode_s) / num_left
    return min(limit_s, max(own_s, LEAST_SHARE * tpot_s))


class LevelMover:
    """Plans one decode worker's moves, at most `moves_per_s` of them."""

    def __init__(self, moves_per_s: float) -> None:
        self._moves_per_s = moves_per_s
        self._saved = min(1.0, moves_per_s)
        self._planned_at: float | None = None
        self._lowered_at = -math.inf

    def plan(self, now: float, rows: Sequence[Row], cost: StepCost, max_rows: int) -> Plan:
        """What to do now; `now` never goes back."""
        since_s = 0.0 if self._planned_at is None else now - self._planned_at
        self._planned_at = now
        most = max(1.0, self._moves_per_s * _BURST_S)
        self._saved = min(most, self._saved + since_s * self._moves_per_s)
        batch = Batch(rows, cost, max_rows)
        outlook = batch.outlook()
        _lower(batch, outlook.limit_s, int(self._saved))
        if batch.moves:
            self._lowered_at = now
        elif now - self._lowered_at >= _HOLD_S:
            _raise(batch, outlook.limit_s, int(self._saved))
        moves = batch.moves
        self._saved -= len(moves)
        return Plan(moves, outlook)


def _lower(batch: Batch, limit_s: float, num_moves: int) -> None:
    """Take rows off the highest chain, then off the one below it, until a step is short enough.

    A chain costs most as long as anybody uses it. Among those at a level the lightest go first,
    then those in the greatest hurry.
    """
    rows = batch.rows
    order = sorted(range(len(rows)), key=lambda i: (rows[i].weight, rows[i].mean_limit_s))
    for level in range(batch.num_chains, 1, -1):
        most_s = upper_limit_s(limit_s, level, batch.cost)
        for i in order:
            if batch.token_s <= limit_s and batch.seconds(level) <= most_s:
                break
            is_free = batch.levels[i] == level > rows[i].min_level
            if is_free and batch.may_move(i, num_moves):
                batch.move(i, -1)


def _raise(batch: Batch, limit_s: float, num_moves: int) -> None:
    """Put rows on the next chain, from the lowest on, as long as a step stays well below the limit.

    Among those at a level the heaviest go first.
    """
    rows = batch.rows
    order = sorted(range(len(rows)), key=lambda i: -rows[i].weight)
    for level in range(1, batch.num_chains):
        most_s = upper_limit_s(limit_s, level + 1, batch.cost, _ROOM_SHARE)
        for i in order:
            is_free = batch.levels[i] == level < rows[i].max_level
            if is_free and batch.may_move(i, num_moves):
                batch.move(i, 1)
                if batch.token_s > _ROOM_SHARE * limit_s or batch.seconds(level + 1) > most_s:
                    batch.move(i, -1)
                    break
