"""A decode worker's step cost, fitted to its steps. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from colm_serve.core import StepCost
from colm_serve.latency.rls import RecursiveLeastSquares

#: A chain may take as much more as it was measured to take, and this share of all chains.
_LEAST_SPREAD = 0.05


class StepFit:
    """Starts from a cost measured beforehand and follows the steps observed.

    The chains' costs share one factor, as the machine is slower at times than it was then, and each
    chain and each chain's rows may take something more: so the levels stay apart, whatever a worker
    happens to run. Wide rows and cached tokens have one factor each.
    """

    def __init__(self, measured: StepCost) -> None:
        self._measured = measured
        chain_s, row_s = measured.chain_s, measured.row_s
        least = _LEAST_SPREAD * sum(chain_s)
        self._fit = RecursiveLeastSquares(
            first=(1.0, *[0.0] * (len(chain_s) + len(row_s)), 1.0, 1.0),
            spread=(
                1.0,
                *(chain + least for chain in chain_s),
                *(row + least / 10 for row in row_s),
                *(1.0, 1.0),
            ),
        )

    def observe(
        self, rows_per_chain: Sequence[int], cached_tokens_per_chain: Sequence[int], seconds: float
    ) -> None:
        """Learn from a step; the counts are those that `StepCost.step_s` takes."""
        narrow = StepCost.NUM_NARROW_ROWS
        wide_rows = [max(0, rows - narrow) for rows in rows_per_chain]
        wide_s = _dot(self._measured.wide_row_s, wide_rows)
        cached_s = _dot(self._measured.cached_token_s, cached_tokens_per_chain)
        used = [float(rows > 0) for rows in rows_per_chain]
        further = [float(max(0, rows - 1)) for rows in rows_per_chain]
        chains_s = _dot(self._measured.chain_s, used) + _dot(self._measured.row_s, further)
        self._fit.observe((chains_s, *used, *further, wide_s, cached_s), seconds)

    @property
    def cost(self) -> StepCost:
        measured, num_chains = self._measured, len(self._measured.chain_s)
        factor, *more_s, wide, cached = self._fit.coefficients
        first_s = (*measured.chain_s, *measured.row_s)
        fitted_s = tuple(factor * s + more for s, more in zip(first_s, more_s, strict=True))
        return StepCost(
            chain_s=fitted_s[:num_chains],
            row_s=fitted_s[num_chains:],
            wide_row_s=tuple(wide * s for s in measured.wide_row_s),
            cached_token_s=tuple(cached * s for s in measured.cached_token_s),
        )


def _dot(seconds: Sequence[float], counts: Sequence[float]) -> float:
    return sum(each * number for each, number in zip(seconds, counts, strict=False))
