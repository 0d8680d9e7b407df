"""A decode worker's step cost, fitted to its steps. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from colm_serve.core import StepCost
from colm_serve.latency.rls import RecursiveLeastSquares

#: A chain's first value may be off by itself, and by this share of a step of all chains.
_LEAST_SPREAD = 0.05


class StepFit:
    """Starts from a cost measured beforehand and follows the steps observed.

    Each chain has its own cost and its own cost of a row. Wide rows and cached tokens are harder
    to tell apart by what a worker happens to run: of these, one factor each is fitted.
    """

    def __init__(self, measured: StepCost) -> None:
        self._measured = measured
        chain_s, row_s = measured.chain_s, measured.row_s
        least = _LEAST_SPREAD * sum(chain_s)
        self._fit = RecursiveLeastSquares(
            first=(*chain_s, *row_s, 1.0, 1.0),
            spread=(
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
        self._fit.observe((*used, *further, wide_s, cached_s), seconds)

    @property
    def cost(self) -> StepCost:
        num_chains = len(self._measured.chain_s)
        values = self._fit.coefficients
        wide, cached = values[2 * num_chains :]
        return StepCost(
            chain_s=tuple(values[:num_chains]),
            row_s=tuple(values[num_chains : 2 * num_chains]),
            wide_row_s=tuple(wide * s for s in self._measured.wide_row_s),
            cached_token_s=tuple(cached * s for s in self._measured.cached_token_s),
        )


def _dot(seconds: Sequence[float], counts: Sequence[int]) -> float:
    return sum(each * number for each, number in zip(seconds, counts, strict=False))
