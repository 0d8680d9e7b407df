"""A rate: what was measured last counts, each measurement by how much it is of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.latency.rate import Rate

measured = st.tuples(st.floats(1e-3, 1e6), st.floats(1e-6, 1e3))


def test_nothing_is_known_before_a_measurement() -> None:
    assert Rate(1.0).per_s is None


def test_newer_measurements_count_more() -> None:
    rate = Rate(memory=100)
    for _ in range(50):
        rate.add(10, 1)
    assert rate.per_s == pytest.approx(10)
    for _ in range(20):
        rate.add(20, 1)
    assert rate.per_s is not None
    assert 18 < rate.per_s < 20


def test_a_slow_pass_over_one_token_counts_for_one_token() -> None:
    """512 tokens in 20 ms, then one in 4 ms: by the sample it would be a tenth of the speed."""
    rate = Rate(memory=4096)
    for _ in range(10):
        rate.add(512, 0.02)
    rate.add(1, 0.004)
    assert rate.per_s == pytest.approx(25_600, rel=0.05)


def test_a_large_pass_outweighs_the_small_ones_before_it() -> None:
    rate = Rate(memory=4096)
    for _ in range(10):
        rate.add(1, 0.004)
    rate.add(512, 0.02)
    assert rate.per_s is not None
    assert rate.per_s > 8_000


@given(measured, measured, st.integers(1, 50))
def test_it_does_not_matter_into_how_many_measurements_work_is_cut(
    before: tuple[float, float], work: tuple[float, float], num_parts: int
) -> None:
    whole, parts = Rate(4096), Rate(4096)
    whole.add(*before)
    parts.add(*before)
    amount, seconds = work
    whole.add(amount, seconds)
    for _ in range(num_parts):
        parts.add(amount / num_parts, seconds / num_parts)
    assert parts.amount <= whole.amount * 1.001, "what came first is forgotten as fast"


@given(st.lists(measured, min_size=1, max_size=20))
def test_it_lies_between_what_was_measured(measurements: list[tuple[float, float]]) -> None:
    rate = Rate(4096)
    for amount, seconds in measurements:
        rate.add(amount, seconds)
    each = [amount / seconds for amount, seconds in measurements]
    assert rate.per_s is not None
    assert min(each) * 0.999 <= rate.per_s <= max(each) * 1.001
