"""How long something takes here, when nothing else runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

_MAX_ROUNDS = 12


def least_s(runs: Sequence[Callable[[], object]], budget_s: float) -> list[float]:
    """The least seconds that each has taken, run in turn: other processes only ever add to that.

    Turns spread what keeps the machine busy for a while over all of them. Each runs at least once,
    none after `budget_s` have gone by.
    """
    least = [float("inf")] * len(runs)
    begin = time.perf_counter()
    for round_ in range(_MAX_ROUNDS):
        for i, run in enumerate(runs):
            started = time.perf_counter()
            if round_ and started - begin > budget_s:
                return least
            run()
            least[i] = min(least[i], time.perf_counter() - started)
    return least
