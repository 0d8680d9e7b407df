"""A prefill worker's cost of a pass, fitted to its passes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from colm_serve.core import PrefillCost
from colm_serve.latency.rls import RecursiveLeastSquares


class PrefillFit:
    """Starts from a cost measured beforehand and follows the passes observed."""

    def __init__(self, measured: PrefillCost) -> None:
        self._measured = measured
        token_s = measured.token_s
        first = (measured.pass_s, token_s, measured.attended_key_s)
        # What was too small to be measured may show in longer passes and behind longer prompts.
        least = (token_s, 0.0, token_s / 10_000)
        spread = (value + more for value, more in zip(first, least, strict=True))
        self._fit = RecursiveLeastSquares(first, tuple(spread))

    def observe(self, chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """Learn from a pass over tokens [start, stop) of each prompt."""
        num_tokens = num_keys = 0
        for start, stop in chunks:
            num_tokens += stop - start
            num_keys += PrefillCost.num_attended_keys(start, stop)
        self._fit.observe((1.0, float(num_tokens), float(num_keys)), seconds)

    @property
    def cost(self) -> PrefillCost:
        pass_s, token_s, attended_key_s = self._fit.coefficients
        return replace(
            self._measured, pass_s=pass_s, token_s=token_s, attended_key_s=attended_key_s
        )
