"""Which workers a decision looks at."""

from __future__ import annotations

from bisect import insort
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import Member, Membership, WorkerKind
from colm_serve.errors import InvalidArgument, ResourceExhausted, Unavailable
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.placing.decision import decide
from colm_serve.router.placing.latency_model import Prediction
from colm_serve.router.placing.pace import pace_of
from colm_serve.router.placing.placement import MAX_ALL, Ranking
from colm_serve.router.placing.policy import Placement, RequestFacts, adaptive
from colm_serve.router.placing.snapshot import ClusterSnapshot, DecodeState, PrefillState, Work
from tests.router.scripted import KV_IDENTITY, NUM_LEVELS, decode_status, prefill_status

PROMPT = tuple(range(100))
MANY = 100


def member(number: int, kind: WorkerKind = WorkerKind.DECODE, epoch: int = 1) -> Member:
    return Member(kind, f"{kind.value}{number}", f"127.0.0.1:{number}", epoch, KV_IDENTITY)


def answer(view: ClusterView, who: Member, **status: object) -> None:
    is_decode = who.kind is WorkerKind.DECODE
    make = decode_status if is_decode else prefill_status
    view.set_status(who, make(epoch=who.epoch, **status), frozenset())


def view_of(num_decode: int, num_prefill: int = 0) -> ClusterView:
    """Workers that are all busy alike."""
    view = ClusterView(KV_IDENTITY)
    decode = [member(number) for number in range(num_decode)]
    prefill = [member(number, WorkerKind.PREFILL) for number in range(num_prefill)]
    view.apply(Membership(1, (*decode, *prefill)))
    for who in decode:
        answer(view, who, num_running=(4, 0, 0))
    for who in prefill:
        answer(view, who, num_queued_tokens=1000)
    return view


def put(view: ClusterView, who: Member, prompt: tuple[int, ...] = PROMPT, salt: str = "") -> None:
    """Place a prompt at a worker, and let it end there."""
    placement = Placement(who, (), 1, Prediction(0.0, 0.0))
    view.place("r", placement, Work(1, len(prompt), 1), prompt, salt)
    view.release("r", placement)


def facts(max_tokens: int = 28) -> RequestFacts:
    return RequestFacts(PROMPT, max_tokens, min_level=1, max_level=NUM_LEVELS)


def numbers(snapshot: ClusterSnapshot) -> set[int]:
    return {int(state.member.worker_id.removeprefix("decode")) for state in snapshot.decode}


def matched(snapshot: ClusterSnapshot) -> dict[str, int]:
    states: list[DecodeState | PrefillState] = [*snapshot.decode, *snapshot.prefill]
    return {s.member.worker_id: s.num_matched_tokens for s in states if s.num_matched_tokens}


@pytest.mark.parametrize("num_workers", [0, 1, MAX_ALL])
def test_of_few_workers_all_are_candidates(num_workers: int) -> None:
    view = view_of(num_workers, num_workers)
    snapshot = view.candidates(PROMPT, "")
    assert numbers(snapshot) == set(range(num_workers))
    assert len(snapshot.prefill) == num_workers


def test_of_many_those_with_the_prompt_and_the_least_loaded() -> None:
    view = view_of(MANY, MANY)
    put(view, member(70))
    put(view, member(71), PROMPT[:50])
    put(view, member(72), PROMPT[:20])
    answer(view, member(40), num_running=(1, 0, 0))
    answer(view, member(41), num_running=(2, 0, 0))
    answer(view, member(42), num_running=(3, 0, 0))
    snapshot = view.candidates(PROMPT, "")
    assert {70, 71, 40, 41} <= numbers(snapshot)
    assert len(snapshot.decode) <= MAX_ALL
    assert len(snapshot.prefill) <= MAX_ALL
    tokens = {who: n for who, n in matched(snapshot).items() if who in ("decode70", "decode71")}
    assert tokens == {"decode70": 96, "decode71": 48}


def test_of_many_the_least_loaded_of_each_pace() -> None:
    view = view_of(MANY)
    loads = {50: (0.1, 3), 51: (0.1, 2), 52: (0.1, 1), 60: (0.4, 9), 61: (0.4, 8), 62: (0.4, 7)}
    for number, (tpot_s, num_rows) in loads.items():
        for row in range(num_rows):
            placement = Placement(member(number), (), 1, Prediction(0.0, 0.0))
            view.place(f"{number}-{row}", placement, Work(1, 10, 10, tpot_s))
        answer(view, member(number))
    assert {51, 52, 62} <= numbers(view.candidates(PROMPT, "", pace=pace_of(0.1)))
    assert {52, 61, 62} <= numbers(view.candidates(PROMPT, "", pace=pace_of(0.4)))
    for row in range(9):
        view.release(f"60-{row}", Placement(member(60), (), 1, Prediction(0.0, 0.0)))
    view.set_unreachable(member(61))
    assert {52, 60, 62} <= numbers(view.candidates(PROMPT, "")), "it has no pace now"


def test_the_others_are_drawn_anew_and_the_same_from_the_same_seed() -> None:
    draws = [
        [frozenset(numbers(view.candidates(PROMPT, ""))) for _ in range(20)]
        for view in (view_of(MANY), view_of(MANY))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 10


def test_a_prefix_is_shared_under_its_salt_only() -> None:
    view = view_of(2)
    put(view, member(1), salt="mine")
    assert matched(view.candidates(PROMPT, "mine")) == {"decode1": 96}
    assert matched(view.candidates(PROMPT, "yours")) == {}
    assert matched(view.candidates(PROMPT, "")) == {}


def test_the_first_prefill_worker_has_the_prompt_too() -> None:
    view = view_of(1, 2)
    first, spare = (member(number, WorkerKind.PREFILL) for number in (1, 0))
    placement = Placement(member(0), (first, spare), 1, Prediction(0.0, 0.0))
    view.place("r", placement, Work(1, len(PROMPT), 1), PROMPT, "")
    assert matched(view.candidates(PROMPT, "")) == {"decode0": 96, "prefill1": 96}


def test_the_next_turn_finds_the_whole_of_the_last_one() -> None:
    view = view_of(3)
    put(view, member(2))
    said = (*PROMPT, *range(60))
    view.cached(member(2), said, "")
    assert matched(view.candidates((*said, 1, 2, 3), "")) == {"decode2": 160}


def test_a_restart_loses_its_own_prefixes_and_no_others() -> None:
    view = view_of(MANY)
    put(view, member(7), PROMPT)
    put(view, member(8), PROMPT[:32])
    others = tuple(member(number) for number in range(MANY) if number != 7)
    reborn = member(7, epoch=2)
    view.apply(Membership(2, (*others, reborn)))
    answer(view, reborn)
    assert matched(view.candidates(PROMPT, "")) == {"decode8": 32}
    put(view, reborn)
    assert matched(view.candidates(PROMPT, "")) == {"decode7": 96, "decode8": 32}


def test_an_unreachable_worker_is_no_candidate_and_keeps_its_prefixes() -> None:
    view = view_of(MANY)
    put(view, member(7))
    view.set_unreachable(member(7))
    assert 7 not in numbers(view.candidates(PROMPT, ""))
    answer(view, member(7))
    assert matched(view.candidates(PROMPT, "")) == {"decode7": 96}


def test_what_a_worker_is_known_to_have_freed_is_room_at_once() -> None:
    view = view_of(1)
    placement = Placement(member(0), (), 2, Prediction(0.0, 0.0))
    view.place("r", placement, Work(2, 100, 28), PROMPT, "")
    view.admitted("r", placement)
    counted = view.counted(member(0))
    busy = decode_status(num_running=(4, 1, 0), num_free_pages=50)
    view.set_status(member(0), busy, counted)
    view.release("r", placement)
    (state,) = view.snapshot().decode
    assert state.status == replace(busy, num_running=(4, 0, 0), num_free_pages=58)
    view.set_status(member(0), busy, frozenset())
    assert view.snapshot().decode[0].status == busy, "what it says itself goes first"


def decided(view: ClusterView, max_tokens: int = 28) -> int:
    placement = decide(adaptive, view, facts(max_tokens), "")
    return int(placement.decode.worker_id.removeprefix("decode"))


def test_the_only_worker_with_room_is_found_among_many() -> None:
    view = view_of(MANY)
    for number in range(MANY):
        # It is the one with the most rows, so that no candidate is like it.
        changes = {"num_running": (8, 0, 0)} if number == 63 else {"num_free_pages": 7}
        answer(view, member(number), **changes)
    assert decided(view) == 63


def test_the_only_worker_that_could_ever_hold_it_is_found_among_many() -> None:
    view = view_of(MANY)
    for number in range(MANY):
        answer(view, member(number), num_pages=64, num_free_pages=64)
    answer(view, member(63), num_running=(8, 0, 0), num_pages=200, num_free_pages=10)
    with pytest.raises(ResourceExhausted):
        decided(view, max_tokens=2000)
    answer(view, member(63), num_running=(8, 0, 0), num_pages=200, num_free_pages=200)
    assert decided(view, max_tokens=2000) == 63
    with pytest.raises(InvalidArgument, match="3200 tokens"):
        decided(view, max_tokens=5000)


def test_refusals_hold_of_every_worker() -> None:
    view = view_of(MANY)
    for number in range(MANY):
        answer(view, member(number), num_free_pages=7)
    with pytest.raises(ResourceExhausted, match="no room"):
        decided(view)
    for number in range(MANY):
        view.set_unreachable(member(number))
    with pytest.raises(Unavailable):
        decided(view)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.none() | st.floats(0, 9, allow_nan=False)), max_size=60
    )
)
def test_a_ranking_is_in_order_after_any_changes(changes: list[tuple[int, float | None]]) -> None:
    ranking = Ranking()
    values: dict[int, float] = {}
    for worker, value in changes:
        if value is None:
            ranking.drop(worker)
            values.pop(worker, None)
        else:
            ranking.set(worker, value)
            values[worker] = value
    order: list[tuple[float, int]] = []
    for worker, value in values.items():
        insort(order, (value, worker))
    assert ranking.least(99) == [worker for _, worker in order]
    assert [ranking.at(i) for i in range(len(ranking))] == ranking.least(99)


Changes = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "restart", "answer", "lost", "put"]),
              st.integers(0, 19)), max_size=80,
)  # fmt: skip


@given(Changes)
def test_under_churn_only_reachable_members_are_candidates(changes: list[tuple[str, int]]) -> None:
    view = ClusterView(KV_IDENTITY)
    epochs: dict[int, int] = {}
    reachable: set[int] = set()
    for version, (what, number) in enumerate(changes, start=1):
        who = member(number, epoch=epochs.get(number, 1))
        if what in ("join", "restart"):
            epochs[number] = epochs.get(number, 0) + (what == "restart") or 1
            if what == "restart":
                reachable.discard(number)
        elif what == "leave":
            epochs.pop(number, None)
            reachable.discard(number)
        elif what == "answer" and number in epochs:
            answer(view, who)
            reachable.add(number)
        elif what == "lost":
            view.set_unreachable(who)
            reachable.discard(number)
        elif what == "put":
            put(view, who)
        members = tuple(member(n, epoch=e) for n, e in epochs.items())
        view.apply(Membership(version, members))
        found = numbers(view.candidates(PROMPT, ""))
        assert found <= reachable
        assert bool(found) == bool(reachable)
        if len(reachable) <= MAX_ALL:
            assert found == reachable


def test_candidates_that_the_policy_leaves_out_are_not_all_there_is() -> None:
    """As where the circuits of the best ones are open."""
    view = view_of(MANY)
    answer(view, member(63), num_running=(4, 0, 0), num_free_pages=64)
    for number in range(MANY):
        if number != 63:
            answer(view, member(number), num_running=(0, 0, 0), num_free_pages=60)

    def only_63(request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
        left = tuple(s for s in cluster.decode if s.member == member(63))
        return adaptive(request, ClusterSnapshot(left))

    assert decide(only_63, view, facts(), "").decode == member(63)
