from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.router.placing.pace import FASTEST, SLOWEST, pace_of


@given(st.floats() | st.none())
def test_every_target_has_a_pace(tpot_s: float | None) -> None:
    assert FASTEST <= pace_of(tpot_s) <= SLOWEST


@given(st.lists(st.floats(min_value=0), min_size=2, max_size=2).map(sorted))
def test_a_shorter_target_is_no_slower_a_pace(targets: list[float]) -> None:
    assert pace_of(targets[0]) <= pace_of(targets[1])


@pytest.mark.parametrize(("tpot_s", "pace"), [(0.001, 0), (0.1, 7), (1e-325, -10), (math.inf, 14)])
def test_a_pace_is_a_power_of_two_of_milliseconds(tpot_s: float, pace: int) -> None:
    assert pace_of(tpot_s) == pace
