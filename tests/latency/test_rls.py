"""Coefficients converge on the true ones, follow them when they change, and never run away."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_serve.latency.rls import RecursiveLeastSquares

TRUE = (0.010, 0.001, 0.00002)
FIRST = (0.015, 0.0005, 0.00001)


def fit() -> RecursiveLeastSquares:
    return RecursiveLeastSquares(FIRST, FIRST)


def loads(seed: int, number: int) -> list[tuple[float, ...]]:
    draw = random.Random(seed)
    return [(1.0, float(draw.randrange(32)), float(draw.randrange(4096))) for _ in range(number)]


def seconds(true: tuple[float, ...], x: tuple[float, ...]) -> float:
    return sum(c * value for c, value in zip(true, x, strict=True))


def test_it_converges_on_exact_measurements() -> None:
    """As nearly as what was believed at first allows, which is never forgotten."""
    model = fit()
    for x in loads(1, 1000):
        model.observe(x, seconds(TRUE, x))
    assert model.coefficients == pytest.approx(TRUE, rel=0.05)
    for x in loads(2, 50):
        assert model.predict(x) == pytest.approx(seconds(TRUE, x), rel=0.03)


def test_it_converges_through_noise_and_outliers() -> None:
    model, draw = fit(), random.Random(2)
    for x in loads(2, 600):
        pause_s = 5.0 if draw.random() < 0.02 else 0.0
        model.observe(x, seconds(TRUE, x) * draw.uniform(0.9, 1.1) + pause_s)
    for x in loads(3, 50):
        assert model.predict(x) == pytest.approx(seconds(TRUE, x), rel=0.1)


def test_it_forgets() -> None:
    """Even measurements that agreed better with what was believed at first."""
    model = fit()
    for x in loads(4, 500):
        model.observe(x, seconds(TRUE, x))
    slower = tuple(3 * c for c in TRUE)
    for x in loads(5, 1000):
        model.observe(x, seconds(slower, x))
    for x in loads(6, 50):
        assert model.predict(x) == pytest.approx(seconds(slower, x), rel=0.15)


def test_what_was_not_observed_for_long_is_not_lost_to_one_outlier() -> None:
    """What is known of it is what was believed at first, and one measurement weighs but so much."""
    model = fit()
    for x in loads(7, 500):
        model.observe(x, seconds(TRUE, x))
    for _ in range(20_000):
        model.observe((1.0, 0.0, 0.0), TRUE[0])
    busy = (1.0, 31.0, 4000.0)
    assert model.predict(busy) == pytest.approx(seconds(TRUE, busy), rel=0.5)
    model.observe(busy, 100.0)
    assert model.predict(busy) < 2.5 * seconds(TRUE, busy)
    for x in loads(8, 200):
        model.observe(x, seconds(TRUE, x))
    assert model.predict(busy) == pytest.approx(seconds(TRUE, busy), rel=0.05)


def test_a_coefficient_without_spread_stays() -> None:
    model = RecursiveLeastSquares((1.0, 2.0), (1.0, 0.0))
    for _ in range(200):
        model.observe((1.0, 1.0), 5.0)
    assert model.coefficients == pytest.approx([3.0, 2.0], rel=0.05)
    assert model.coefficients[1] == 2.0


def test_what_loads_do_not_tell_apart_is_shared_and_stays_so() -> None:
    """However long, and through any noise: nothing drifts where nothing is learnt."""
    model, draw = RecursiveLeastSquares((0.001, 0.001), (0.001, 0.003)), random.Random(11)
    for _ in range(20_000):
        model.observe((1.0, 1.0), 0.007 * draw.lognormvariate(0.0, 0.3))
    total_s = sum(model.coefficients)
    assert total_s == pytest.approx(0.007, rel=0.1)
    # By variance, as far as the one goes above its first value and the other too.
    assert model.coefficients[0] == pytest.approx(0.001 + (total_s - 0.002) / 10, rel=0.02)


def test_what_once_told_coefficients_apart_is_forgotten() -> None:
    model = RecursiveLeastSquares((0.001, 0.001), (0.001, 0.001))
    for i in range(1000):
        model.observe((1.0, float(i % 2)), 0.003 + 0.002 * (i % 2))
    assert model.coefficients == pytest.approx([0.003, 0.002], rel=0.05)
    for _ in range(5000):
        model.observe((1.0, 1.0), 0.005)
    assert model.coefficients == pytest.approx([0.0025, 0.0025], rel=0.02)


def test_what_would_be_negative_is_zero_and_the_others_fit_all_the_same() -> None:
    """Clipping the one alone would leave the others wrong."""
    model = RecursiveLeastSquares((0.002, 0.0001), (0.002, 0.0002))
    for i in range(2000):
        model.observe((1.0, float(i % 8)), 0.004 - 0.0001 * (i % 8))
    assert model.coefficients == pytest.approx([0.00365, 0.0], rel=0.01)


anything = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(anything, anything, anything, anything), max_size=40))
@settings(max_examples=100, deadline=None)
def test_garbage_leaves_it_bounded_and_able_to_learn(
    garbage: list[tuple[float, float, float, float]],
) -> None:
    model = fit()
    for *values, measured in garbage:
        model.observe(values, measured)
        assert all(0 <= c < math.inf for c in model.coefficients)
    for x in loads(9, 1000):
        model.observe(x, seconds(TRUE, x))
    for x in loads(10, 20):
        assert model.predict(x) == pytest.approx(seconds(TRUE, x), rel=0.1)
