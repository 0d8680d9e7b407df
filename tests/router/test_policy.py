from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import Member, StepCost, WorkerKind
from colm_serve.errors import InvalidArgument, ResourceExhausted, Unavailable
from colm_serve.router.latency_model import predict, rows_by_level
from colm_serve.router.policy import RequestFacts, highest_level_least_finish, num_free_pages
from colm_serve.router.snapshot import ClusterSnapshot, DecodeState, PrefillState, Work
from tests.router.scripted import KV_IDENTITY, NUM_LEVELS, decode_status, prefill_status

place = highest_level_least_finish


def member(kind: WorkerKind, worker_id: str) -> Member:
    return Member(kind, worker_id, f"{worker_id}:1", 1, KV_IDENTITY)


def decode(worker_id: str = "d0", **changes: Any) -> DecodeState:
    """A worker whose every step takes 10 ms a chain, and 1 ms a chain for each further row."""
    around = {k: changes.pop(k) for k in ("outstanding", "tpot_s") if k in changes}
    status = decode_status(worker_id=worker_id, **changes)
    return DecodeState(member(WorkerKind.DECODE, worker_id), status, **around)


def prefill(worker_id: str = "p0", num_outstanding_tokens: int = 0, **changes: Any) -> PrefillState:
    status = prefill_status(worker_id=worker_id, **changes)
    return PrefillState(member(WorkerKind.PREFILL, worker_id), status, num_outstanding_tokens)


def facts(**changes: Any) -> RequestFacts:
    base = RequestFacts(prompt=(5,) * 100, max_tokens=28, min_level=1, max_level=NUM_LEVELS)
    return replace(base, **changes)


def cluster(*states: DecodeState | PrefillState) -> ClusterSnapshot:
    return ClusterSnapshot(
        tuple(s for s in states if isinstance(s, DecodeState)),
        tuple(s for s in states if isinstance(s, PrefillState)),
    )


@pytest.mark.parametrize(
    ("request_changes", "state_changes", "level"),
    [
        ({}, {}, 3),  # no targets: the most there is
        ({"max_level": 2}, {}, 2),
        ({"tpot_s": 0.030}, {}, 3),  # 3 chains of 10 ms just fit
        ({"tpot_s": 0.029}, {}, 2),
        ({"tpot_s": 0.010}, {}, 1),
        ({"tpot_s": 0.001}, {}, 1),  # nothing fits: the least, rather than none
        ({"tpot_s": 0.001, "min_level": 2}, {}, 2),
        # Beside a row of level 3 a step takes 30 ms, and 1 ms more for each chain of this one.
        ({"tpot_s": 0.031}, {"num_running": (0, 0, 1)}, 1),
        ({"tpot_s": 0.032}, {"num_running": (0, 0, 1)}, 2),
        ({"tpot_s": 0.033}, {"num_running": (0, 0, 1)}, 3),
        ({}, {"num_running": (0, 0, 1), "tpot_s": 0.032}, 2),  # for the sake of one that runs
        ({"ttft_s": 0.111}, {"prefill_tokens_per_s": 1000.0}, 1),  # 100 ms of prompt + 10 ms
        ({"ttft_s": 0.121}, {"prefill_tokens_per_s": 1000.0}, 2),
        ({"ttft_s": 0.030}, {"prefill_tokens_per_s": 0.0}, 3),  # a rate not measured yet
        ({"tpot_s": 0.029}, {"step_cost": StepCost((), ())}, 3),  # costs not measured yet
    ],
)
def test_level(request_changes: Any, state_changes: Any, level: int) -> None:
    assert place(facts(**request_changes), cluster(decode(**state_changes))).level == level


def test_outstanding_work_counts_as_running() -> None:
    work = Work(level=3, num_prompt_tokens=10, max_tokens=10)
    state = decode(outstanding=(work,))
    assert rows_by_level(state, 2) == (0, 1, 1)
    assert place(facts(tpot_s=0.032), cluster(state)).level == 2


def test_a_worker_that_keeps_the_targets_is_preferred() -> None:
    busy, idle = decode("d0", num_running=(0, 0, 6)), decode("d1")
    placement = place(facts(tpot_s=0.031), cluster(busy, idle))
    assert (placement.decode.worker_id, placement.level) == ("d1", 3)


def test_at_equal_levels_the_least_finish_wins() -> None:
    slow = decode("d0", step_cost=StepCost((0.02,) * 3, (0.001,) * 3))
    assert place(facts(), cluster(slow, decode("d1"))).decode.worker_id == "d1"
    assert place(facts(), cluster(decode("d0"), decode("d1"))).decode.worker_id == "d0"


def test_more_rows_than_a_step_holds_take_turns() -> None:
    full = decode(num_running=(8, 0, 0), max_rows=8)
    prediction = predict(full, None, level=1, num_prompt_tokens=100, max_tokens=28)
    assert prediction.tpot_s == pytest.approx((0.010 + 7 * 0.001) * 9 / 8)
    assert prediction.ttft_s == pytest.approx(0.1 + prediction.tpot_s)
    assert prediction.finish_s(28) == pytest.approx(prediction.ttft_s + 27 * prediction.tpot_s)


def test_without_room_here_the_request_goes_there() -> None:
    full = decode("d0", num_free_pages=7)  # 128 tokens need 8 pages of 16
    assert place(facts(), cluster(full, decode("d1"))).decode.worker_id == "d1"
    promised = decode("d0", num_free_pages=15, outstanding=(Work(1, 100, 28),))
    assert num_free_pages(promised) == 7
    assert place(facts(), cluster(promised, decode("d1"))).decode.worker_id == "d1"


def test_room_is_needed_for_the_output_that_the_worker_expects() -> None:
    state = decode(num_free_pages=8, expected_output_tokens=28)
    assert place(facts(max_tokens=900), cluster(state)).decode.worker_id == "d0"
    promised = replace(state, outstanding=(Work(1, 4, 900),))
    assert num_free_pages(promised) == 6
    with pytest.raises(ResourceExhausted):
        place(facts(max_tokens=900), cluster(promised))


def test_without_room_anywhere_it_is_refused() -> None:
    with pytest.raises(ResourceExhausted, match="no room for 128 tokens") as error:
        place(facts(), cluster(decode("d0", num_free_pages=7), decode("d1", num_free_pages=0)))
    assert error.value.retry_after_s > 0


def test_what_no_worker_could_ever_hold_is_an_invalid_argument() -> None:
    with pytest.raises(InvalidArgument, match="112 tokens") as error:
        place(facts(), cluster(decode(num_free_pages=7, num_pages=7)))
    assert error.value.field == "max_tokens"


def test_no_decode_worker() -> None:
    with pytest.raises(Unavailable):
        place(facts(), cluster(prefill()))


def test_who_refused_is_not_asked_again_and_who_failed_comes_last() -> None:
    first, second = decode("d0"), decode("d1")
    both = cluster(first, second)
    refused = facts(refused_by=frozenset({first.member}))
    assert place(refused, both).decode.worker_id == "d1"
    with pytest.raises(ResourceExhausted):
        place(refused, cluster(first))
    failed = facts(failed_at=frozenset({first.member}))
    assert place(failed, both).decode.worker_id == "d1"
    assert place(failed, cluster(first)).decode.worker_id == "d0"


def test_prefill_workers_in_order_of_their_queues() -> None:
    placement = place(
        facts(),
        cluster(
            decode(),
            prefill("p0", num_queued_tokens=500),
            prefill("p1", num_outstanding_tokens=100),
            prefill("p2", num_queued_tokens=1000, tokens_per_s=100_000.0),
            prefill("p3", num_queued_tokens=900),
        ),
    )
    assert [m.worker_id for m in placement.prefill] == ["p1", "p2", "p0"]
    assert placement.prediction.ttft_s == pytest.approx(0.01 + 0.01 + 0.03)


DECODE_STATES = st.builds(
    lambda i, running, free, waiting, tpot, outstanding: decode(
        f"d{i}",
        num_running=running,
        num_free_pages=free,
        num_waiting=waiting,
        tpot_s=tpot,
        outstanding=tuple(outstanding),
    ),
    st.integers(0, 9),
    st.tuples(*[st.integers(0, 8)] * NUM_LEVELS),
    st.integers(0, 64),
    st.integers(0, 4),
    st.none() | st.floats(0.001, 0.1),
    st.lists(
        st.builds(Work, st.integers(1, 3), st.integers(1, 99), st.integers(1, 29)), max_size=3
    ),
)
TARGETS = st.none() | st.floats(0.001, 1.0)


@given(
    st.lists(DECODE_STATES, min_size=1, max_size=4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda pair: tuple(sorted(pair))),
    TARGETS,
    TARGETS,
)
def test_any_request_is_served_within_its_bounds_or_has_no_room(
    states: list[DecodeState], bounds: tuple[int, int], ttft_s: float | None, tpot_s: float | None
) -> None:
    low, high = bounds
    request = facts(min_level=low, max_level=high, ttft_s=ttft_s, tpot_s=tpot_s)
    has_room = any(num_free_pages(state) >= 8 for state in states)
    try:
        placement = place(request, cluster(*states))
    except ResourceExhausted:
        # The level has no part in it: what a lower level could serve is never refused.
        assert not has_room
        with pytest.raises(ResourceExhausted):
            place(replace(request, min_level=1), cluster(*states))
        return
    assert has_room
    assert low <= placement.level <= high
    chosen = next(s for s in states if s.member == placement.decode and num_free_pages(s) >= 8)
    assert num_free_pages(chosen) >= 8
    if ttft_s is None and tpot_s is None and all(s.tpot_s is None for s in states):
        assert placement.level == high


@given(DECODE_STATES, st.floats(0.001, 0.1))
def test_a_looser_target_never_lowers_the_level(state: DecodeState, tpot_s: float) -> None:
    roomy = replace(state, status=replace(state.status, num_free_pages=64), outstanding=())
    strict = place(facts(tpot_s=tpot_s), cluster(roomy)).level
    assert place(facts(tpot_s=tpot_s * 2), cluster(roomy)).level >= strict
