"""What runs at a decode worker, and what a token takes there. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from colm_serve.core import DecodeStatus, StepCost


@dataclass(frozen=True, slots=True)
class Work:
    """One request that this router has placed on a worker; it may be moved to `min_level`."""

    level: int
    num_prompt_tokens: int
    max_tokens: int
    tpot_s: float | None = None
    min_level: int = 1

    @property
    def num_attended(self) -> int:
        """Tokens that one of its steps attends to, on average."""
        return self.num_prompt_tokens + self.max_tokens // 2

    def num_reserved_tokens(self, expected_output_tokens: int) -> int:
        """What a worker that expects so much output reserves pages for."""
        return self.num_prompt_tokens + min(self.max_tokens, expected_output_tokens)


@dataclass(frozen=True, slots=True)
class Load:
    """How many rows use each chain, and how many tokens these attend to.

    Beside them there are `num_waiting` requests of which not even the level is known.
    """

    num_rows: tuple[int, ...]
    num_attended: tuple[int, ...]
    num_waiting: int = 0

    @classmethod
    def of_work(cls, work: Iterable[Work], num_levels: int) -> Load:
        rows, attended = [0] * num_levels, [0] * num_levels
        for each in work:
            rows[each.level - 1] += 1
            attended[each.level - 1] += each.num_attended
        return cls(_per_chain(rows), _per_chain(attended))

    @classmethod
    def of_status(cls, status: DecodeStatus) -> Load:
        size = status.num_levels
        rows = [*status.num_running, *[0] * (size - len(status.num_running))]
        attended = [*status.num_attended, *[0] * (size - len(status.num_attended))]
        return cls(_per_chain(rows), _per_chain(attended), status.num_waiting)

    def plus(self, other: Load) -> Load:
        return Load(
            tuple(map(sum, zip(self.num_rows, other.num_rows, strict=True))),
            tuple(map(sum, zip(self.num_attended, other.num_attended, strict=True))),
            self.num_waiting + other.num_waiting,
        )

    def lowered(self, placed: Iterable[Work]) -> Load:
        """The same, once each of these runs at the lowest level that it may."""
        rows, attended = list(self.num_rows), list(self.num_attended)
        for work in placed:
            for chain in range(work.min_level, work.level):
                if rows[chain]:
                    attended[chain] -= attended[chain] // rows[chain]
                    rows[chain] -= 1
        return Load(tuple(rows), tuple(attended), self.num_waiting)


class TokenTimes:
    """What a token takes at each level, once a further request runs there at it.

    Those whose level is not known are taken to run at that level too, and to be as long as the
    request. More rows than a step holds take turns.
    """

    __slots__ = ("_fixed_s", "_token_s", "_without_s")

    def __init__(self, load: Load, cost: StepCost, max_rows: int) -> None:
        num_new = 1 + load.num_waiting
        turns = max(1.0, (load.num_rows[0] + num_new) / max_rows)
        cached_token_s = cost.cached_token_s or (0.0,) * len(load.num_rows)
        base_s = more_s = token_s = 0.0
        more, self._token_s = [], []
        loads = zip(load.num_rows, load.num_attended, cached_token_s, strict=False)
        for chain, (rows, attended, each_s) in enumerate(loads):
            attended_now, rows_now = attended / turns, rows + num_new
            if rows_now > max_rows:
                rows, rows_now = min(rows, max_rows), max_rows
            without_s = cost.chain_step_s(chain, rows, attended_now)
            with_s = cost.chain_step_s(chain, rows_now, attended_now)
            base_s += without_s
            more_s += with_s - without_s
            token_s += num_new * each_s
            more.append(more_s)
            self._token_s.append(token_s)
        self._without_s = max(1.0, load.num_rows[0] / max_rows) * base_s
        self._fixed_s = [turns * (base_s + seconds) for seconds in more]

    def tpot_s(self, level: int, num_attended: int) -> float:
        """Seconds from token to token; the request attends to so many tokens."""
        return self._fixed_s[level - 1] + num_attended * self._token_s[level - 1]

    def added_s(self, level: int, num_attended: int) -> float:
        """How much of that the request adds, to the tokens of the others too."""
        return self.tpot_s(level, num_attended) - self._without_s


def _per_chain(per_level: Sequence[int]) -> tuple[int, ...]:
    """Of those at its level and above, which use the chain."""
    return tuple(accumulate(reversed(per_level)))[::-1]
