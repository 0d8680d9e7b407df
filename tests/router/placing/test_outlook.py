"""What the rows of a worker leave to newcomers, as they end one by one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import StepCost
from colm_serve.router.placing.batch import Batch, Row
from colm_serve.router.placing.outlook import Departures

#: 10 ms a chain and 2 ms a chain for each further row.
COST = StepCost((0.010, 0.010), (0.002, 0.002))
PARTS = st.lists(st.tuples(st.integers(0, 50), st.floats(0.0, 0.1)), max_size=8)


def row(level: int, num_left: int, mean_limit_s: float = math.inf) -> Row:
    tpot_s = None if mean_limit_s == math.inf else mean_limit_s
    return Row("r", level, 1, 2, 0, num_left, mean_limit_s, tpot_s)


@given(PARTS, st.integers(1, 60))
def test_the_mean_of_steps_that_grow_shorter(
    parts: list[tuple[int, float]], num_tokens: int
) -> None:
    steps = [sum(s for end, s in parts if end > token) for token in range(num_tokens)]
    saved_s = sum(s for _, s in parts) - sum(steps) / num_tokens
    assert Departures(parts).mean_saving_s(num_tokens) == pytest.approx(saved_s, abs=1e-9)


def test_nothing_is_saved_for_who_has_no_tokens_left() -> None:
    assert Departures([(0, 1.0)]).mean_saving_s(0) == 0.0


@pytest.mark.parametrize(
    ("rows", "limit_s"),
    [
        ([], math.inf),
        ([row(1, 100)], math.inf),
        ([row(1, 100, 0.020)], 0.020),
        # The other ends after a quarter; of the 2 ms that two take more it has half.
        ([row(1, 100, 0.020), row(1, 25)], 0.020 + 0.75 * 0.001),
        # With it goes the second chain, which nobody else uses.
        ([row(1, 100, 0.020), row(2, 25)], 0.020 + 0.75 * 0.011),
        # Whoever stays longer saves nothing.
        ([row(1, 100, 0.020), row(2, 100)], 0.020),
        ([row(1, 100, 0.020), row(2, 25), row(1, 10, 0.018)], 0.018),
    ],
)
def test_how_long_a_step_may_be_at_first(rows: list[Row], limit_s: float) -> None:
    outlook = Batch(rows, COST, max_rows=8).outlook()
    assert outlook.limit_s == pytest.approx(limit_s)
    targets = [r.tpot_s for r in rows if r.tpot_s is not None]
    assert outlook.tpot_s == min(targets, default=None)


def test_rows_that_take_turns() -> None:
    """Four rows, two at a time: a token takes two steps of 12 ms, of which a row has 1 ms."""
    rows = [row(1, 100, 0.050), *[row(1, 50)] * 3]
    outlook = Batch(rows, COST, max_rows=2).outlook()
    assert outlook.limit_s == pytest.approx(0.050 + 0.5 * 3 * 0.001)
