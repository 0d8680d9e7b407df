from __future__ import annotations

from dataclasses import replace

import pytest

from colm_serve.core import StepCost
from colm_serve.errors import ResourceExhausted
from colm_serve.router.overload import (
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    at_least_level,
    idle_level,
    retry_after_s,
)
from colm_serve.router.placing.outlook import Departures, Outlook
from colm_serve.router.placing.policy import adaptive as policy
from colm_serve.router.placing.snapshot import Work
from tests.router.placing.test_policy import cluster, decode, facts, prefill

STEP_COST = StepCost((0.014, 0.01, 0.01), (0.002, 0.001, 0.001))


@pytest.mark.parametrize(
    ("request_changes", "level"),
    [
        ({}, 3),
        ({"max_level": 2}, 2),
        ({"tpot_s": 0.029}, 2),  # what even an idle worker cannot keep at level 3
        ({"ttft_s": 0.145}, 3),  # 100 ms of prompt and three chains of 10 ms
    ],
)
def test_the_idle_level_is_that_of_these_workers_without_work(
    request_changes: dict[str, float], level: int
) -> None:
    work = Work(level=3, num_prompt_tokens=10, max_tokens=10, tpot_s=0.001)
    busy = decode(num_running=(8, 8, 8), num_waiting=9, num_free_pages=0, outstanding=(work,))
    request = facts(refused_by=frozenset({busy.member}), **request_changes)
    outlook = Outlook(0.001, None, Departures([(1, 9.0)]))
    assert idle_level(policy, request, cluster(replace(busy, outlook=outlook))) == level
    assert idle_level(policy, request, cluster(replace(busy, tpot_s=0.001))) == level


def test_prompts_that_wait_are_load_too() -> None:
    snapshot = cluster(decode(), prefill(num_outstanding_tokens=9000, num_queued_tokens=9000))
    with pytest.raises(ResourceExhausted):
        policy(facts(ttft_s=0.05), snapshot)
    assert idle_level(policy, facts(ttft_s=0.05), snapshot) == 3


def test_what_the_lowest_level_would_get_beside_all_that_runs() -> None:
    full = decode(num_running=(0, 0, 4), num_free_pages=0, outstanding=(Work(3, 500, 9),))
    placement = at_least_level(policy, facts(ttft_s=0.001, tpot_s=0.001), cluster(full))
    assert placement.level == 1
    step_s = 0.030 + 4 * 0.003 + 0.001
    assert placement.prediction.tpot_s == pytest.approx(step_s)
    assert placement.prediction.ttft_s == pytest.approx(0.1 + step_s)


@pytest.mark.parametrize(
    ("num_ahead", "num_workers", "expected_s"),
    [
        (0, 1, 256 * 0.024 / 5),  # one of 5 rows ends
        (9, 1, 10 * 256 * 0.024 / 5),
        (9, 10, 256 * 0.024 / 5),
        (0, 1000, MIN_RETRY_AFTER_S),
        (999, 1, MAX_RETRY_AFTER_S),
    ],
)
def test_retry_after_is_when_those_ahead_have_ended(
    num_ahead: int, num_workers: int, expected_s: float
) -> None:
    # Five rows of level 1 and this one.
    busy = decode(num_running=(5, 0, 0), num_free_pages=0, step_cost=STEP_COST)
    snapshot = cluster(busy)
    placement = at_least_level(policy, facts(), snapshot)
    assert placement.prediction.tpot_s == pytest.approx(0.024)
    seconds = retry_after_s(placement, snapshot, num_ahead, num_workers)
    assert seconds == pytest.approx(expected_s)


def test_workers_that_could_not_hold_it_tell_its_speed_all_the_same() -> None:
    """Candidates may all be too small where another worker is not."""
    small = cluster(decode(num_pages=7, num_free_pages=0))
    assert idle_level(policy, facts(), small) == 3
    assert at_least_level(policy, facts(), small).level == 1


def test_nothing_is_refused_for_the_sake_of_others() -> None:
    work = Work(level=1, num_prompt_tokens=10, max_tokens=10, tpot_s=0.001)
    strict = decode(num_running=(1, 0, 0), placed=(work,), tpot_s=0.001)
    with pytest.raises(ResourceExhausted):
        policy(facts(min_level=3), cluster(strict))
    assert at_least_level(policy, facts(min_level=3), cluster(strict)).level == 3
    assert idle_level(policy, facts(min_level=3), cluster(strict)) == 3
