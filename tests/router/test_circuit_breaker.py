from __future__ import annotations

from dataclasses import replace

import pytest

from colm_serve.core import Member, WorkerKind
from colm_serve.router.circuit_breaker import MAX_OPEN_S, CircuitBreakers

D0 = Member(WorkerKind.DECODE, "d0", "127.0.0.1:1", 1, "kv")
D1 = replace(D0, worker_id="d1")


def opened() -> CircuitBreakers:
    """D0's circuit was opened at 0 for 2 seconds, by the third failure."""
    breakers = CircuitBreakers(max_failures=3, open_s=2.0)
    assert [breakers.failed(D0, 0.0) for _ in range(3)] == [False, False, True]
    return breakers


def test_failures_in_a_row_open_a_circuit_and_no_other() -> None:
    breakers = opened()
    assert not breakers.allows(D0, 1.9)
    assert breakers.allows(D1, 0.0)
    assert breakers.open_ones() == {D0}


def test_a_success_between_failures_keeps_it_closed() -> None:
    breakers = CircuitBreakers(max_failures=2, open_s=2.0)
    for _ in range(5):
        assert not breakers.failed(D0, 0.0)
        breakers.succeeded(D0)
    assert breakers.allows(D0, 0.0)


def test_half_open_lets_one_probe_through() -> None:
    breakers = opened()
    assert breakers.allows(D0, 2.0)
    breakers.begin(D0, 2.0)
    assert not breakers.allows(D0, 2.0)
    assert breakers.open_ones() == {D0}


def test_a_probe_that_succeeds_closes_it() -> None:
    breakers = opened()
    breakers.begin(D0, 2.0)
    breakers.succeeded(D0)
    assert breakers.allows(D0, 2.0)
    assert breakers.open_ones() == frozenset()
    assert not breakers.failed(D0, 2.0), "it takes as many failures as at first"


def test_each_probe_that_fails_doubles_the_wait() -> None:
    breakers, now = opened(), 0.0
    for wait_s in (2.0, 4.0, 8.0, 16.0, 32.0, MAX_OPEN_S, MAX_OPEN_S):
        assert not breakers.allows(D0, now + wait_s - 0.01)
        now += wait_s
        assert breakers.allows(D0, now)
        breakers.begin(D0, now)
        assert breakers.failed(D0, now)


def test_a_probe_of_which_nothing_is_heard_is_followed_by_another() -> None:
    breakers = opened()
    breakers.begin(D0, 2.0)
    assert breakers.allows(D0, 4.0)


def test_requests_that_were_there_when_it_opened_do_not_keep_it_open() -> None:
    breakers = opened()
    assert not any(breakers.failed(D0, 1.0) for _ in range(50))
    assert breakers.allows(D0, 2.0)


@pytest.mark.parametrize(("kept", "is_open"), [((D0,), True), ((D1,), False)])
def test_workers_that_have_left_are_forgotten(kept: tuple[Member, ...], is_open: bool) -> None:
    breakers = opened()
    breakers.keep(kept)
    assert (D0 in breakers.open_ones()) is is_open
