"""What each kind of work takes, from the times of a few mixes of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from colm_serve.latency.bounded_minimum import bounded_minimum

#: Of the largest share of a time that a coefficient may make: bounds the condition number.
_RIDGE = 1e-5


def fit_costs(loads: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients c, none negative, with the least squares of the relative errors of c · x.

    A load that is part of another takes no longer than that one, so what it took beyond that was
    not its own.

    Args:
        loads: x of each measurement, none negative.
        seconds: what it took, above 0.
    """
    times = [
        min(s for other, s in zip(loads, seconds, strict=True) if _is_part(load, other))
        for load in loads
    ]
    shares = [[x / s for x in load] for load, s in zip(loads, times, strict=True)]
    scales = [max(column) or 1.0 for column in zip(*shares, strict=True)]
    scaled = [[x / scale for x, scale in zip(row, scales, strict=True)] for row in shares]
    columns = list(zip(*scaled, strict=True))
    matrix = [[sum(map(float.__mul__, a, b)) for b in columns] for a in columns]
    for i, row in enumerate(matrix):
        row[i] += _RIDGE
    fitted = bounded_minimum(matrix, [sum(column) for column in columns], [0.0] * len(columns))
    return [value / scale for value, scale in zip(fitted, scales, strict=True)]


def _is_part(load: Sequence[float], other: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(load, other, strict=True))
