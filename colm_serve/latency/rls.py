"""Recursive least squares with forgetting: coefficients that follow what is measured. Pure.

See Haykin, Adaptive Filter Theory, chapter 10. Three things keep it safe to run for ever: no
coefficient leaves its bounds, none becomes less certain than it was at first (forgetting inflates
the covariance of what is not observed), and one measurement far off counts for little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Relative standard deviation taken for measurements.
_NOISE = 0.1
#: A measurement is believed to be off by so much of what was predicted at most.
_MAX_ERROR = 0.5
#: How many times its first spread a coefficient may end up above its first value.
_MAX_SPREADS = 20.0


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
        self.coefficients = list(first)
        self._spread = list(spread)
        self._most = [c + _MAX_SPREADS * s for c, s in zip(first, spread, strict=True)]
        self._forgetting = 1.0 - 1.0 / memory
        self._covariance = _identity(len(first))  # in units of the spreads

    def predict(self, x: Sequence[float]) -> float:
        return _dot(self.coefficients, x)

    def observe(self, x: Sequence[float], measured: float) -> None:
        """Learn from one measurement; what is not finite, or not positive, is ignored."""
        if not (0 < measured < math.inf and all(map(math.isfinite, x))):
            return
        # Relative to the prediction, so that long and short work weigh the same.
        predicted = self.predict(x)
        scale = predicted if predicted > 0 else measured
        error = (measured - predicted) / scale
        scaled = [value * spread / scale for value, spread in zip(x, self._spread, strict=True)]
        p_x = [_dot(row, scaled) for row in self._covariance]
        variance = _dot(scaled, p_x) + self._forgetting * _NOISE**2
        if not 0 < variance < math.inf:
            self._covariance = _identity(len(p_x))
            return
        step = max(-_MAX_ERROR, min(error, _MAX_ERROR)) / variance
        for i, (gain, spread) in enumerate(zip(p_x, self._spread, strict=True)):
            moved = self.coefficients[i] + gain * step * spread
            self.coefficients[i] = min(max(0.0, moved), self._most[i])
        # One that is far off is no reason to be more certain.
        self._update_covariance(p_x, variance if abs(error) <= _MAX_ERROR else math.inf)

    def _update_covariance(self, p_x: Sequence[float], variance: float) -> None:
        inflation = 1.0 / self._forgetting
        rows = [
            [
                (value - left * right / variance) * inflation
                for value, right in zip(row, p_x, strict=True)
            ]
            for row, left in zip(self._covariance, p_x, strict=True)
        ]
        # Rows and columns are scaled alike, which keeps the matrix positive definite.
        for i, row in enumerate(rows):
            if row[i] > 1.0:
                shrink = 1.0 / math.sqrt(row[i])
                rows[i] = [value * shrink for value in row]
                for other in rows:
                    other[i] *= shrink
        self._covariance = rows


def _identity(size: int) -> list[list[float]]:
    return [[float(i == j) for j in range(size)] for i in range(size)]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
