"""How long something takes here, when nothing else runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

_MIN_ROUNDS, _MAX_ROUNDS = 5, 16
#: A round that lowers all the times together by less was not needed.
_MIN_GAIN = 0.01


def least_s(runs: Sequence[Callable[[], object]], budget_s: float) -> list[float]:
    """The least seconds that each has taken, run in turn: other processes only ever add to that.

    Turns spread what keeps the machine busy for a while over all of them; there are more of them
    as long as that helps. Each runs at least once, none after `budget_s` have gone by.
    """
    least = [float("inf")] * len(runs)
    begin = time.perf_counter()
    for round_ in range(_MAX_ROUNDS):
        before_s = sum(least)
        for i, run in enumerate(runs):
            started = time.perf_counter()
            if round_ and started - begin > budget_s:
                return least
            run()
            least[i] = min(least[i], time.perf_counter() - started)
        if round_ + 1 >= _MIN_ROUNDS and sum(least) > (1 - _MIN_GAIN) * before_s:
            return least
    return least
