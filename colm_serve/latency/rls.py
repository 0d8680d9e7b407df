"""Recursive least squares with forgetting, and with a prior that is not forgotten. Pure.

After n measurements y_k of loads x_k the coefficients c are those, none negative, that minimise

    sum over k of forgetting^(n - k) · weight_k · (y_k - c · x_k)²
    + sum over i of ((c_i - first_i) / spread_i)²

They are kept as normal equations (the information form; Haykin, Adaptive Filter Theory, chapter
10). Where loads do not tell two coefficients apart, the first values decide how they share what
was measured, so that neither drifts; once loads that told them apart are forgotten, they return
there. The weights are relative to what is predicted, so that long and short work count alike, and
Huber's (Robust Statistics, 1981, section 7.8), so that a pause counts for little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from colm_serve.latency.bounded_minimum import bounded_minimum

#: Relative standard deviation taken for measurements, on cores that other processes use too.
_NOISE = 0.3
#: Relative error from which measurements weigh less; one alone moves no coefficient by more than
#: _MAX_ERROR / _NOISE² spreads.
_MAX_ERROR = 0.6
#: Measurements after which the coefficients are worked out again: they tell what is far off.
_MAX_PENDING = 16


class RecursiveLeastSquares:
    """Coefficients c, none negative, such that c · x predicts what is measured at x.

    Args:
        first: what to believe before anything has been measured.
        spread: by how much each of them may well be wrong; 0 keeps one as it is.
        memory: measurements after which one counts for 1/e.
    """

    def __init__(
        self, first: Sequence[float], spread: Sequence[float], memory: float = 200.0
    ) -> None:
        self._first, self._spread = tuple(first), tuple(spread)
        self._lowest = [-c / s if s > 0 else 0.0 for c, s in zip(first, spread, strict=True)]
        self._forgetting = 1.0 - 1.0 / memory
        # What the measurements say of each coefficient's deviation from its first, in spreads.
        self._information = [[0.0] * len(self._first) for _ in self._first]
        self._evidence = [0.0] * len(self._first)
        self._coefficients = list(first)
        self._num_pending = 0

    @property
    def coefficients(self) -> list[float]:
        if self._num_pending:
            self._solve()
        return self._coefficients

    def predict(self, x: Sequence[float]) -> float:
        return _dot(self.coefficients, x)

    def observe(self, x: Sequence[float], measured: float) -> None:
        """Learn from one measurement; what is not finite, or negative, is ignored."""
        if not (0 < measured < math.inf and all(0 <= value < math.inf for value in x)):
            return
        predicted = _dot(self._coefficients, x)
        # A load of which little is known must not outweigh what is known.
        scale = max(predicted, _dot(self._spread, x))
        if not 0 < scale < math.inf:
            return
        error = (measured - predicted) / scale
        deviation = (measured - _dot(self._first, x)) / scale
        if not (math.isfinite(error) and math.isfinite(deviation)):
            return
        weight = _MAX_ERROR / max(_MAX_ERROR, abs(error)) / _NOISE**2
        self._add([v * s / scale for v, s in zip(x, self._spread, strict=True)], deviation, weight)
        if self._num_pending >= _MAX_PENDING:
            self._solve()

    def _add(self, scaled: Sequence[float], deviation: float, weight: float) -> None:
        """Note that the sum of `scaled`, in spreads of each coefficient, is `deviation`."""
        keep = self._forgetting
        for i, value in enumerate(scaled):
            gain = weight * value
            self._evidence[i] = keep * self._evidence[i] + gain * deviation
            row = zip(self._information[i], scaled, strict=True)
            self._information[i] = [keep * old + gain * other for old, other in row]
        self._num_pending += 1

    def _solve(self) -> None:
        """The prior bounds the condition number: it is at most 1 + memory / _NOISE²."""
        matrix = [row.copy() for row in self._information]
        for i, row in enumerate(matrix):
            row[i] += 1.0
        deviations = bounded_minimum(matrix, self._evidence, self._lowest)
        values = zip(self._first, self._spread, deviations, strict=True)
        self._coefficients = [max(0.0, first + s * deviation) for first, s, deviation in values]
        self._num_pending = 0


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
