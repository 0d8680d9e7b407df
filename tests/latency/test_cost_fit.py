"""A few timed mixes tell what each kind of work takes, however busy the machine was."""

from __future__ import annotations

import random

import pytest

from colm_serve.latency.cost_fit import fit_costs

#: Of two chains: used, further rows of each.
LOADS = [(1, n - 1, used, used * (n - 1)) for used in (0, 1) for n in (1, 8, 16, 32)]
TRUE = (4e-3, 2e-4, 2e-3, 1e-4)


def seconds_of(costs: tuple[float, ...] | list[float], load: tuple[int, ...]) -> float:
    return sum(c * x for c, x in zip(costs, load, strict=True))


def test_exact_times_give_the_coefficients_back() -> None:
    fitted = fit_costs(LOADS, [seconds_of(TRUE, load) for load in LOADS])
    assert fitted == pytest.approx(TRUE, rel=0.01)


def test_noise_makes_no_coefficient_negative_and_leaves_predictions_near() -> None:
    draw = random.Random(1)
    for _ in range(50):
        noisy = [seconds_of(TRUE, load) * draw.uniform(1.0, 1.1) for load in LOADS]
        fitted = fit_costs(LOADS, noisy)
        assert min(fitted) >= 0
        for load in LOADS:
            assert seconds_of(fitted, load) == pytest.approx(seconds_of(TRUE, load), rel=0.12)


def test_a_pause_in_a_part_is_not_its_own() -> None:
    """What holds more work took less, so the rest of the time was somebody else's."""
    times = [seconds_of(TRUE, load) for load in LOADS]
    paused = [times[0] * 100, *times[1:]]
    fitted = fit_costs(LOADS, paused)
    assert seconds_of(fitted, LOADS[0]) == pytest.approx(times[0], rel=0.3)


def test_work_that_no_load_holds_costs_nothing() -> None:
    assert fit_costs([(1, 0), (2, 0)], [0.5, 1.0]) == pytest.approx([0.5, 0.0], rel=0.01)
