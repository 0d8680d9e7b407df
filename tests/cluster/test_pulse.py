"""Busy is not dead: what each sign of life, and its absence, is taken for."""

from __future__ import annotations

import pytest

from colm_serve.cluster.pulse import Pulse
from colm_serve.core import Health

STILL_S, BUSY_S = 10.0, 120.0


@pytest.fixture
def pulse() -> Pulse:
    return Pulse(STILL_S, BUSY_S, now=0.0)


def test_who_answers_is_alive(pulse: Pulse) -> None:
    for second in range(1000):
        assert pulse.answered(Health(pid=7), second) is None
    assert pulse.pid == 7


def test_who_is_silent_but_works_is_busy_for_long(pulse: Pulse) -> None:
    """As one that holds the interpreter: the killed router of the 10 MB prompt."""
    for second in range(5, 121, 5):
        assert pulse.silent(float(second), second) is None
    assert pulse.answered(Health(pid=7), 121.0) is None
    assert pulse.silent(121.0, 126.0) is None


def test_a_starved_process_is_busy(pulse: Pulse) -> None:
    """Of a machine with other things to do it gets a tenth of a processor."""
    for second in range(5, 121, 5):
        assert pulse.silent(0.1 * second, second) is None


def test_even_who_works_is_of_no_use_at_last(pulse: Pulse) -> None:
    assert pulse.silent(119.0, 119.0) is None
    assert pulse.silent(121.0, 121.0) == "it has been too busy to answer for 121 s"


def test_who_neither_answers_nor_works_is_dead(pulse: Pulse) -> None:
    """As a stopped process. What idle threads of it use is no work."""
    assert pulse.answered(Health(pid=7), 1.0) is None
    assert pulse.silent(3.0, 6.0) is None
    assert pulse.silent(3.05, 11.0) is None
    assert pulse.silent(3.1, 16.0) == "it has neither answered nor worked for 15 s"


def test_one_slow_answer_is_none_too_many(pulse: Pulse) -> None:
    for second in range(5, 1000, 10):
        assert pulse.silent(3.0, second) is None
        assert pulse.answered(Health(pid=7), second + 5) is None


def test_what_is_not_known_is_not_held_against_it(pulse: Pulse) -> None:
    for second in range(5, 121, 5):
        assert pulse.silent(None, second) is None
    assert pulse.silent(None, 121.0) is not None


def test_a_loop_that_computes_is_busy_and_one_that_waits_is_dead(pulse: Pulse) -> None:
    for second in range(60):
        health = Health(pid=7, loop_stalled_s=second, loop_cpu_s=0.5 * second)
        assert pulse.answered(health, second) is None
    for second in range(60, 70):
        assert pulse.answered(Health(7, loop_stalled_s=second, loop_cpu_s=30.0), second) is None
    dead = pulse.answered(Health(7, loop_stalled_s=70.0, loop_cpu_s=30.0), 70.0)
    assert dead == "its event loop has stood still for 70 s"


def test_a_loop_that_goes_on_begins_anew(pulse: Pulse) -> None:
    for second in range(0, 200, 10):
        assert pulse.answered(Health(7, loop_stalled_s=9.0), second) is None
        assert pulse.answered(Health(7, loop_stalled_s=0.0), second + 1) is None


@pytest.mark.parametrize(
    ("health", "why"),
    [
        (Health(7, turn_s=121.0), "its engine has been in one pass for 121 s"),
        (Health(7, loop_stalled_s=121.0), "its event loop has been in one call for 121 s"),
    ],
)
def test_nothing_may_take_for_ever(pulse: Pulse, health: Health, why: str) -> None:
    assert pulse.answered(health, 1.0) == why


def test_a_long_pass_is_work(pulse: Pulse) -> None:
    assert pulse.answered(Health(7, turn_s=119.0), 119.0) is None
