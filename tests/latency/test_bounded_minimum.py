"""The minimum is where no variable can move to a lower value."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_serve.latency.bounded_minimum import bounded_minimum


def test_bounds_that_do_not_bind_leave_the_solution_of_the_equations() -> None:
    assert bounded_minimum([[2, 1], [1, 3]], [4, 7], [-9, -9]) == pytest.approx([1, 2])


def test_a_variable_at_its_bound_moves_the_others() -> None:
    assert bounded_minimum([[2, 1], [1, 3]], [4, 7], [2, -9]) == pytest.approx([2, 5 / 3])
    assert bounded_minimum([[2, 1], [1, 3]], [4, 7], [4, 4]) == [4, 4]


def test_nothing_is_the_minimum_of_nothing() -> None:
    assert bounded_minimum([], [], []) == []


@given(st.integers(1, 10), st.integers(0, 2**32), st.floats(0, 1000))
@settings(max_examples=200, deadline=None)
def test_no_variable_can_move_to_a_lower_value(size: int, seed: int, weight: float) -> None:
    """The Kuhn-Tucker conditions, for columns that are nearly the same."""
    draw = random.Random(seed)
    columns = [draw.random() for _ in range(30)]
    data = [[c + draw.choice((0.001, 1.0)) * draw.random() for _ in range(size)] for c in columns]
    matrix = [
        [(i == j) + weight * sum(row[i] * row[j] for row in data) for j in range(size)]
        for i in range(size)
    ]
    vector = [draw.uniform(-100, 100) * (1 + weight) for _ in range(size)]
    lowest = [-draw.random() for _ in range(size)]
    solution = bounded_minimum(matrix, vector, lowest)
    for row, b, value, low in zip(matrix, vector, solution, lowest, strict=True):
        slope = sum(a * other for a, other in zip(row, solution, strict=True)) - b
        rounding = 1e-6 * (1 + weight)
        assert value >= low
        assert slope > -rounding
        assert value == low or slope < rounding
