from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.config import RouterConfig
from colm_serve.core import Member, StepCost, TransferCost, WorkerKind
from colm_serve.errors import InvalidArgument, ResourceExhausted, Unavailable
from colm_serve.router.placing.facts import RequestFacts
from colm_serve.router.placing.latency_model import AIMED_TPOT_SHARE, AIMED_TTFT_SHARE
from colm_serve.router.placing.load import Load
from colm_serve.router.placing.offer import Offers
from colm_serve.router.placing.outlook import Departures, Outlook
from colm_serve.router.placing.policy import adaptive as place
from colm_serve.router.placing.policy import aggregated, fixed_level, make_policy
from colm_serve.router.placing.snapshot import ClusterSnapshot, DecodeState, PrefillState, Work
from tests.router.scripted import KV_IDENTITY, NUM_LEVELS, decode_status, prefill_status


def member(kind: WorkerKind, worker_id: str) -> Member:
    return Member(kind, worker_id, f"{worker_id}:1", 1, KV_IDENTITY)


def decode(worker_id: str = "d0", **changes: Any) -> DecodeState:
    """A worker whose every step takes 10 ms a chain, and 1 ms a chain for each further row."""
    around = {
        k: changes.pop(k)
        for k in ("outstanding", "placed", "tpot_s", "num_matched_tokens")
        if k in changes
    }
    status = decode_status(worker_id=worker_id, **changes)
    return DecodeState(member(WorkerKind.DECODE, worker_id), status, **around)


def prefill(worker_id: str = "p0", num_outstanding_tokens: int = 0, **changes: Any) -> PrefillState:
    num_matched = changes.pop("num_matched_tokens", 0)
    status = prefill_status(worker_id=worker_id, **changes)
    who = member(WorkerKind.PREFILL, worker_id)
    return PrefillState(who, status, num_outstanding_tokens, num_matched)


def facts(**changes: Any) -> RequestFacts:
    base = RequestFacts(prompt=(5,) * 100, max_tokens=28, min_level=1, max_level=NUM_LEVELS)
    return replace(base, **changes)


def cluster(*states: DecodeState | PrefillState) -> ClusterSnapshot:
    return ClusterSnapshot(
        tuple(s for s in states if isinstance(s, DecodeState)),
        tuple(s for s in states if isinstance(s, PrefillState)),
    )


#: 0.1 ms a chain for each token attended to; the row of level 3 attends to 1000.
ATTENDED = {
    "step_cost": StepCost((0.010,) * 3, (0.001,) * 3, (), (0.0001,) * 3),
    "num_attended": (0, 0, 1000),
}


@pytest.mark.parametrize(
    ("request_changes", "state_changes", "level"),
    [
        ({}, {}, 3),  # no targets: the most there is
        ({"max_level": 2}, {}, 2),
        ({"tpot_s": 0.0317}, {}, 3),  # 3 chains of 10 ms, and a twentieth is kept free
        ({"tpot_s": 0.0315}, {}, 2),
        ({"tpot_s": 0.010}, {}, 1),
        ({"tpot_s": 0.001}, {}, 1),  # nothing fits: the least, rather than none
        ({"tpot_s": 0.001, "min_level": 2}, {}, 2),
        # Beside a row of level 3 a step takes 30 ms, and 1 ms more for each chain of this one. Of
        # what one alone would leave of the limit, above the lowest level 0.7 is kept free.
        ({"tpot_s": 0.0421}, {"num_running": (0, 0, 1)}, 1),
        ({"tpot_s": 0.0422}, {"num_running": (0, 0, 1)}, 3),
        ({"tpot_s": 0.0282}, {"num_running": (0, 1, 0)}, 2),
        ({}, {"num_running": (0, 0, 1), "tpot_s": 0.0421}, 1),  # for the sake of one that runs
        ({}, {"num_running": (0, 0, 1), "tpot_s": 0.0422}, 3),
        ({"ttft_s": 0.123}, {"prefill_tokens_per_s": 1000.0}, 1),  # 100 ms of prompt + 10 ms
        ({"ttft_s": 0.134}, {"prefill_tokens_per_s": 1000.0}, 2),
        ({"ttft_s": 0.034}, {"prefill_tokens_per_s": 0.0}, 3),  # a rate not measured yet
        ({"tpot_s": 0.029}, {"step_cost": StepCost((), ())}, 3),  # costs not measured yet
        # 28 tokens: 27 of 30 ms after the first, which has 130 ms.
        ({"deadline_s": 0.941}, {"prefill_tokens_per_s": 1000.0}, 3),
        ({"deadline_s": 0.939}, {"prefill_tokens_per_s": 1000.0}, 2),
        ({"deadline_s": 9.0, "age_s": 8.061}, {"prefill_tokens_per_s": 1000.0}, 2),
        ({"deadline_s": 0.001}, {"prefill_tokens_per_s": 1000.0}, 1),  # its text may be short
        ({"ttft_s": 0.5, "age_s": 0.321}, {"prefill_tokens_per_s": 1000.0}, 2),
        ({"ttft_s": 0.056}, {"prefill_tokens_per_s": 1000.0, "num_matched_tokens": 80}, 3),
        # 1000 tokens that others attend to, 100 and half of 28 of its own: 0.1 ms each a chain.
        ({"tpot_s": 0.385}, {"num_running": (0, 0, 1), **ATTENDED}, 1),
        ({"tpot_s": 1.22}, {"num_running": (0, 0, 1), **ATTENDED}, 3),
    ],
)
def test_level(request_changes: Any, state_changes: Any, level: int) -> None:
    assert place(facts(**request_changes), cluster(decode(**state_changes))).level == level


def test_outstanding_work_counts_as_running() -> None:
    work = Work(level=3, num_prompt_tokens=10, max_tokens=10)
    state = decode(outstanding=(work,))
    assert state.load == Load((1, 1, 1), (15, 15, 15))
    assert place(facts(tpot_s=0.036), cluster(state)).level == 1


def test_a_worker_that_keeps_the_targets_is_preferred() -> None:
    busy, idle = decode("d0", num_running=(0, 0, 6)), decode("d1")
    placement = place(facts(tpot_s=0.034), cluster(busy, idle))
    assert (placement.decode.worker_id, placement.level) == ("d1", 3)


def test_at_equal_levels_the_least_finish_wins() -> None:
    slow = decode("d0", step_cost=StepCost((0.02,) * 3, (0.001,) * 3))
    assert place(facts(), cluster(slow, decode("d1"))).decode.worker_id == "d1"
    assert place(facts(), cluster(decode("d0"), decode("d1"))).decode.worker_id == "d0"


def test_more_rows_than_a_step_holds_take_turns() -> None:
    full = decode(num_running=(8, 0, 0), max_rows=8)
    prediction = place(facts(max_level=1), cluster(full)).prediction
    assert prediction.tpot_s == pytest.approx((0.010 + 7 * 0.001) * 9 / 8)
    assert prediction.ttft_s == pytest.approx(0.1 + prediction.tpot_s)
    assert prediction.finish_s(28) == pytest.approx(prediction.ttft_s + 27 * prediction.tpot_s)


RUNNING = Work(level=3, num_prompt_tokens=100, max_tokens=28, tpot_s=0.015)


def test_others_are_counted_on_to_go_down_before_it_is_refused() -> None:
    """Beside a row of level 3 a token takes 31 ms, beside one of level 1 11 ms."""
    state = decode(num_running=(0, 0, 1), placed=(RUNNING,), tpot_s=0.015)
    for request in (facts(), facts(tpot_s=0.0125)):
        placement = place(request, cluster(state))
        assert placement.level == 1
        assert placement.prediction.tpot_s == pytest.approx(0.011)
    pinned = replace(state, placed=(replace(RUNNING, min_level=3),))
    with pytest.raises(ResourceExhausted):
        place(facts(tpot_s=0.0125), cluster(pinned))
    with pytest.raises(ResourceExhausted):
        place(facts(min_level=2), cluster(state))
    elsewhere = place(facts(), cluster(state, decode("d1")))
    assert (elsewhere.decode.worker_id, elsewhere.level) == ("d1", 3)


def test_what_the_lowest_level_cannot_keep_is_refused_with_what_was_predicted() -> None:
    busy = decode(num_running=(0, 0, 1))
    late = facts(tpot_s=0.030, min_level=1)
    with pytest.raises(ResourceExhausted, match=r"at level 1, .* 131 ms .* 31 ms") as error:
        place(late, cluster(busy))
    assert error.value.retry_after_s > 0
    assert place(replace(late, is_begun=True), cluster(busy)).level == 1


def test_a_light_request_leaves_room_to_heavier_ones() -> None:
    """Beside eight rows of level 1 a token takes 18 ms: of a limit of 20 ms they get 13."""
    busy = decode(num_running=(8, 0, 0), max_rows=32, tpot_s=0.021)
    light = facts(heavier_tpot_s=0.021)
    assert place(facts(), cluster(busy)).level == 1
    with pytest.raises(ResourceExhausted):
        place(light, cluster(busy))
    assert place(replace(light, tpot_s=0.021), cluster(replace(busy, tpot_s=None))).level == 1


def test_where_a_slower_pace_is_kept_no_room_is_left_to_heavier_ones() -> None:
    work = Work(level=1, num_prompt_tokens=100, max_tokens=28, tpot_s=0.200)
    state = decode(num_running=(8, 0, 0), max_rows=32, tpot_s=0.030, placed=(work,) * 8)
    with pytest.raises(ResourceExhausted):
        place(facts(heavier_tpot_s=math.inf), cluster(replace(state, tpot_s=0.025)))
    assert place(facts(heavier_tpot_s=0.010), cluster(replace(state, tpot_s=0.025))).level == 1


@pytest.mark.parametrize(
    ("tpot_s", "worker_id"),
    [(0.044, "strict"), (0.100, "loose"), (0.120, "loose"), (None, "loose")],
)
def test_requests_share_workers_with_those_that_want_their_pace(
    tpot_s: float | None, worker_id: str
) -> None:
    """Both run as much, and either would do."""

    def busy(worker_id: str, tpot_s: float) -> DecodeState:
        work = Work(level=1, num_prompt_tokens=100, max_tokens=28, tpot_s=tpot_s)
        running = {"num_running": (4, 0, 0), "max_rows": 32, "placed": (work,) * 4}
        return decode(worker_id, tpot_s=tpot_s, **running)

    workers = cluster(busy("strict", 0.040), busy("loose", 0.120))
    assert place(facts(tpot_s=tpot_s), workers).decode.worker_id == worker_id


def test_requests_share_workers_where_they_add_least() -> None:
    """Where level 2 is in use already, it delays the others by its own row only."""
    low = decode("low", num_running=(4, 0, 0), max_rows=32)
    high = decode("high", num_running=(0, 5, 0), max_rows=32)
    assert place(facts(min_level=2), cluster(low, high)).decode.worker_id == "high"
    assert place(facts(min_level=1), cluster(low, high)).decode.worker_id == "low"


def test_what_runs_leaves_more_to_newcomers_once_it_ends() -> None:
    """For half of the request's tokens a row takes 1 ms of 11; the limit is 10.5 ms."""
    state = decode(num_running=(1, 0, 0))
    request = facts(tpot_s=0.0105 / AIMED_TPOT_SHARE)
    with pytest.raises(ResourceExhausted):
        place(request, cluster(state))
    outlook = Outlook(math.inf, None, Departures([(14, 0.001)]))
    assert place(request, cluster(replace(state, outlook=outlook))).level == 1
    with pytest.raises(ResourceExhausted):  # a strict one has come since then
        place(facts(), cluster(replace(state, outlook=outlook, tpot_s=0.011)))
    tight = replace(outlook, limit_s=0.0109)
    with pytest.raises(ResourceExhausted):
        place(request, cluster(replace(state, outlook=tight)))


@pytest.mark.parametrize(
    ("target", "value", "says"),
    [
        ("tpot_s", 0.009, r"tpot_ms: 9.0 .* 10 or more, predicted of an idle worker at level 1"),
        ("ttft_s", 0.100, r"ttft_ms: 100.0 .* 110 or more, predicted of an idle worker"),
    ],
)
def test_a_target_that_no_idle_worker_could_keep(target: str, value: float, says: str) -> None:
    state = decode(num_running=(4, 0, 1), num_waiting=2)
    impossible = facts(**{target: value})
    own = replace(impossible, own_targets=frozenset({target.replace("_s", "_ms")}))
    with pytest.raises(InvalidArgument, match=says):
        place(own, cluster(state))
    assert place(impossible, cluster(state)).level == 1, "the class's: served as well as can be"


def test_a_target_that_an_idle_worker_just_keeps_is_served() -> None:
    own = facts(tpot_s=0.0105, own_targets=frozenset({"tpot_ms"}))
    assert place(own, cluster(decode())).level == 1


@pytest.mark.parametrize(
    ("level", "bounds", "expected"), [(2, (1, 3), 2), (2, (3, 3), 3), (3, (1, 2), 2)]
)
def test_a_fixed_level_heeds_bounds_and_no_targets(
    level: int, bounds: tuple[int, int], expected: int
) -> None:
    low, high = bounds
    request = facts(min_level=low, max_level=high, tpot_s=0.001, ttft_s=0.001)
    fast = decode("d1", step_cost=StepCost((0.009,) * 3, (0.001,) * 3))
    placement = fixed_level(level)(request, cluster(decode("d0"), fast))
    assert (placement.level, placement.decode.worker_id) == (expected, "d1")


def test_aggregated_workers_compute_their_prompts() -> None:
    placement = aggregated(facts(), cluster(decode(), prefill()))
    assert placement.prefill == ()
    assert placement.prediction.ttft_s == pytest.approx(0.1 + 0.03)


def test_the_config_names_the_policy() -> None:
    assert make_policy(RouterConfig()) is place
    assert make_policy(RouterConfig(policy="aggregated")) is aggregated
    fixed = make_policy(RouterConfig(policy="fixed_level", fixed_level=2))
    assert fixed(facts(), cluster(decode())).level == 2


def test_without_room_here_the_request_goes_there() -> None:
    full = decode("d0", num_free_pages=7)  # 128 tokens need 8 pages of 16
    assert place(facts(), cluster(full, decode("d1"))).decode.worker_id == "d1"
    promised = decode("d0", num_free_pages=15, outstanding=(Work(1, 100, 28),))
    assert promised.num_free_pages == 7
    assert place(facts(), cluster(promised, decode("d1"))).decode.worker_id == "d1"


def test_room_is_needed_for_the_output_that_the_worker_expects() -> None:
    state = decode(num_free_pages=8, expected_output_tokens=28)
    assert place(facts(max_tokens=900), cluster(state)).decode.worker_id == "d0"
    promised = replace(state, outstanding=(Work(1, 4, 900),))
    assert promised.num_free_pages == 6
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
            prefill("p0", queued_s=0.05, num_waiting=1),
            prefill("p1", num_outstanding_tokens=100),
            prefill("p2", queued_s=0.04, num_running=3, num_matched_tokens=90),
            prefill("p3", queued_s=0.09, num_waiting=1, num_matched_tokens=90),
            prefill("p4", queued_s=0.09, num_running=2),
        ),
    )
    # 10 ms of its own, or 1 ms of what is not cached; shared passes: as much for each other.
    assert [m.worker_id for m in placement.prefill] == ["p2", "p1", "p4"]
    assert placement.prediction.ttft_s == pytest.approx(0.001 + 3 * 0.001 + 0.03)


@pytest.mark.parametrize(
    ("cost", "num_matched", "prompt_s"),
    [
        (TransferCost(call_s=0.002), 0, 0.002 + 0.010),
        (TransferCost(call_s=0.002, token_s=0.0002), 0, 0.002 + 0.020),  # longer than computing
        (TransferCost(call_s=0.002, token_s=0.0002), 60, 0.002 + 0.010),
        (TransferCost(call_s=0.002, token_s=0.01), 0, 0.1),  # sooner computed here
        (TransferCost(call_s=0.002), 99, 0.001),
        (TransferCost(call_s=0.002), 100, 0.0),
    ],
)
def test_a_prompt_is_there_once_computed_and_shipped(
    cost: TransferCost, num_matched: int, prompt_s: float
) -> None:
    state = decode(transfer_cost=cost, num_matched_tokens=num_matched)
    placement = place(facts(), cluster(state, prefill()))
    assert placement.prediction.ttft_s == pytest.approx(prompt_s + 0.03)


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


def breaks_targets(request: RequestFacts, state: DecodeState, level: int) -> bool:
    prediction = Offers(request, ()).at(state, level).prediction
    tpots = [t for t in (request.tpot_s, state.tpot_s) if t is not None]
    ttft_s = request.ttft_s
    is_late = ttft_s is not None and prediction.ttft_s > AIMED_TTFT_SHARE * ttft_s
    return is_late or any(prediction.tpot_s > AIMED_TPOT_SHARE * t for t in tpots)


@given(
    st.lists(DECODE_STATES, min_size=1, max_size=4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda pair: tuple(sorted(pair))),
    TARGETS,
    TARGETS,
)
def test_any_request_is_served_within_its_bounds_or_no_level_would_do(
    states: list[DecodeState], bounds: tuple[int, int], ttft_s: float | None, tpot_s: float | None
) -> None:
    low, high = bounds
    request = facts(min_level=low, max_level=high, ttft_s=ttft_s, tpot_s=tpot_s)
    has_room = any(state.num_free_pages >= 8 for state in states)
    try:
        placement = place(request, cluster(*states))
    except ResourceExhausted:
        for state in (s for s in states if s.num_free_pages >= 8):
            for level in range(low, high + 1):
                assert breaks_targets(request, state, level)
        if has_room:
            assert place(replace(request, is_begun=True), cluster(*states)).level == low
            without = [replace(state, tpot_s=None) for state in states]
            free = replace(request, ttft_s=None, tpot_s=None)
            assert place(free, cluster(*without)).level == high
        return
    assert has_room
    assert low <= placement.level <= high
    chosen = [s for s in states if s.member == placement.decode]
    assert any(state.num_free_pages >= 8 for state in chosen)
    if ttft_s is None and tpot_s is None and all(s.tpot_s is None for s in states):
        assert placement.level == high


@given(DECODE_STATES, st.floats(0.001, 0.1))
def test_a_looser_target_never_lowers_the_level(state: DecodeState, tpot_s: float) -> None:
    roomy = replace(state, status=replace(state.status, num_free_pages=64), outstanding=())
    strict = place(facts(tpot_s=tpot_s, is_begun=True), cluster(roomy)).level
    assert place(facts(tpot_s=tpot_s * 2, is_begun=True), cluster(roomy)).level >= strict
