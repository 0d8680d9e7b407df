from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.router.token_bucket import TokenBucket


def test_a_minutes_worth_at_once_then_at_the_steady_rate() -> None:
    bucket = TokenBucket(60, now_s=100.0)
    assert bucket.take(50, 100.0) is None
    assert bucket.take(11, 100.0) == 1.0
    assert bucket.take(10, 100.0) is None
    assert bucket.take(1, 100.5) == 0.5
    assert bucket.take(1, 101.0) is None
    assert bucket.num_left(131.5) == 30


def test_what_is_given_back_can_be_taken_and_the_bucket_does_not_run_over() -> None:
    bucket = TokenBucket(60, now_s=0.0)
    assert bucket.take(60, 0.0) is None
    bucket.give_back(20, 0.0)
    assert bucket.num_left(0.0) == 20
    bucket.give_back(60, 0.0)
    assert bucket.num_left(0.0) == 60
    assert bucket.num_left(1000.0) == 60


def test_a_clock_that_stands_still_or_goes_back_fills_nothing() -> None:
    bucket = TokenBucket(60, now_s=10.0)
    assert bucket.take(60, 10.0) is None
    assert bucket.num_left(9.0) == 0
    assert bucket.num_left(10.0) == 0


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(0, 10**10), st.integers(1, 1000)), max_size=50),
)
def test_grants_are_exact(per_min: int, asked: list[tuple[int, int]]) -> None:
    """What is granted up to any moment is what a bucket of exact fractions grants."""
    bucket, left, now_ns = TokenBucket(per_min, 0.0), Fraction(per_min), 0
    for gap_ns, count in asked:
        now_ns += gap_ns
        left = min(Fraction(per_min), left + Fraction(gap_ns * per_min, 60 * 10**9))
        count = min(count, per_min)
        wait_s = bucket.take(count, now_ns / 10**9)
        assert (wait_s is None) == (count <= left)
        if wait_s is None:
            left -= count
        else:
            assert wait_s == pytest.approx(float((count - left) * 60 / per_min), abs=2e-9)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0, 1e6))
def test_after_the_wait_that_it_names_it_grants(per_min: int, count: int, now_s: float) -> None:
    bucket = TokenBucket(per_min, now_s)
    count = min(count, per_min)
    bucket.take(per_min, now_s)
    wait_s = bucket.take(count, now_s)
    assert wait_s is not None
    assert bucket.take(count, now_s + wait_s + 1e-9) is None
