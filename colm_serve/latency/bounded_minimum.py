"""The minimum of a small convex quadratic function of bounded variables. Pure."""

from __future__ import annotations

from collections.abc import Sequence

#: What counts as negative; far above what rounding makes of a well-conditioned matrix.
_TOLERANCE = 1e-9


def bounded_minimum(
    matrix: Sequence[Sequence[float]], vector: Sequence[float], lowest: Sequence[float]
) -> list[float]:
    """The v >= lowest that minimises v · A v / 2 - b · v.

    By principal pivoting (Murty, Linear Complementarity, 1988, section 4.1). With u = v - lowest
    and the slopes w = A u + q, one of u_i and w_i is 0 and neither negative: start with every u at
    0, and while one of the others is negative, let the first such one change places with its 0.

    Args:
        matrix: A, symmetric and positive definite, so that this ends.
        vector: b.
    """
    rows = [
        [*row, sum(a * low for a, low in zip(row, lowest, strict=True)) - b]
        for row, b in zip(matrix, vector, strict=True)
    ]
    is_free = [False] * len(rows)
    while (wrong := _first_negative(rows)) is not None:
        _exchange(rows, wrong)
        is_free[wrong] = not is_free[wrong]
    return [
        low + (max(0.0, row[-1]) if free else 0.0)
        for low, row, free in zip(lowest, rows, is_free, strict=True)
    ]


def _first_negative(rows: Sequence[Sequence[float]]) -> int | None:
    return next((i for i, row in enumerate(rows) if row[-1] < -_TOLERANCE), None)


def _exchange(rows: list[list[float]], k: int) -> None:
    """Each row says what a variable is, from those that are 0; let variable k and its 0 change."""
    pivot = rows[k][k]
    exchanged = [-value / pivot for value in rows[k]]
    exchanged[k] = 1.0 / pivot
    for i, row in enumerate(rows):
        factor = row[k]
        if i != k and factor:
            row[k] = 0.0
            rows[i] = [value + factor * other for value, other in zip(row, exchanged, strict=True)]
    rows[k] = exchanged
