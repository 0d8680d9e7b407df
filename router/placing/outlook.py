"""What those that run on a worker leave to newcomers: how long its steps may be. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate


class Departures:
    """When parts of what a step has to do end, and how much shorter a step is from then on.

    Nobody is taken to come: whoever does has to leave those that are there in time.
    """

    def __init__(self, parts: Iterable[tuple[int, float]]) -> None:
        """Each: after how many more tokens it ends, and its seconds of a step until then."""
        ordered = sorted(parts)
        self._ends = [num_tokens for num_tokens, _ in ordered]
        self._part_s = [0.0, *accumulate(part_s for _, part_s in ordered)]
        self._spent_s = [0.0, *accumulate(n * part_s for n, part_s in ordered)]

    def mean_saving_s(self, num_tokens: int) -> float:
        """By how much the mean of the next so many steps is below the first."""
        if num_tokens <= 0:
            return 0.0
        num_ended = bisect_left(self._ends, num_tokens)
        return self._part_s[num_ended] - self._spent_s[num_ended] / num_tokens


@dataclass(frozen=True)
class Outlook:
    """As it was when the rows of a worker were last looked at.

    With steps of `limit_s` at first all of them keep their targets, if nobody else comes; `tpot_s`
    is the strictest of these.
    """

    limit_s: float
    tpot_s: float | None
    departures: Departures
