from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from colm_serve.core import Member, Membership, WorkerKind
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.placing.latency_model import Prediction
from colm_serve.router.placing.policy import Placement
from colm_serve.router.placing.snapshot import ClusterSnapshot, Work
from tests.router.scripted import KV_IDENTITY, decode_status, prefill_status

DECODE = Member(WorkerKind.DECODE, "d0", "127.0.0.1:1", 1, KV_IDENTITY)
PREFILL = Member(WorkerKind.PREFILL, "p0", "127.0.0.1:2", 1, KV_IDENTITY)
PLACEMENT = Placement(DECODE, (PREFILL,), 2, Prediction(0.0, 0.0))
WORK = Work(level=2, num_prompt_tokens=30, max_tokens=10, tpot_s=0.05)


def view_of(*members: Member) -> ClusterView:
    view = ClusterView(KV_IDENTITY)
    view.apply(Membership(1, members))
    for member in members:
        is_decode = member.kind is WorkerKind.DECODE
        status = decode_status() if is_decode else prefill_status()
        view.set_status(member, status, frozenset())
    return view


def test_a_member_is_unknown_until_it_answers() -> None:
    view = ClusterView(KV_IDENTITY)
    view.apply(Membership(1, (DECODE,)))
    assert view.snapshot().decode == ()
    view.set_status(DECODE, decode_status(), frozenset())
    assert [state.member for state in view.snapshot().decode] == [DECODE]
    view.set_unreachable(DECODE)
    assert view.snapshot().decode == ()
    assert not view.has_reachable_decode()


def test_only_a_newer_membership_counts_and_what_is_known_is_kept() -> None:
    view = view_of(DECODE)
    assert not view.apply(Membership(1, ()))
    assert not view.apply(Membership(0, ()))
    assert view.apply(Membership(2, (DECODE, PREFILL)))
    assert view.version == 2
    assert view.has_reachable_decode()
    restarted = replace(DECODE, epoch=2)
    view.apply(Membership(3, (restarted,)))
    assert not view.has_reachable_decode()


def test_membership_version_0_is_the_first_like_any_other() -> None:
    view = ClusterView(KV_IDENTITY)
    assert view.apply(Membership(0, (DECODE,)))
    assert len(view.records) == 1


def test_other_weights_are_never_used_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    foreign = replace(DECODE, kv_identity="other")
    view = ClusterView(KV_IDENTITY)
    with caplog.at_level(logging.ERROR):
        view.apply(Membership(1, (foreign,)))
        view.apply(Membership(2, (foreign,)))
    assert view.records == ()
    assert len(caplog.records) == 1
    assert "other weights" in caplog.text


@pytest.mark.parametrize("change", [{"epoch": 2}, {"kv_identity": "other"}])
def test_an_answer_from_another_process_is_no_answer(change: dict[str, object]) -> None:
    view = view_of(DECODE)
    view.set_status(DECODE, decode_status(**change), frozenset())
    assert not view.has_reachable_decode()


def test_a_placement_counts_until_a_status_has_it() -> None:
    view = view_of(DECODE, PREFILL)
    view.place("r", PLACEMENT, WORK)
    snapshot = view.snapshot()
    assert snapshot.decode[0].outstanding == (WORK,)
    assert snapshot.prefill[0].num_outstanding_tokens == 30
    # Asked before the worker had admitted it, a status may not have it.
    early = view.counted(DECODE)
    view.admitted("r", PLACEMENT)
    view.set_status(DECODE, decode_status(), early)
    assert view.snapshot().decode[0].outstanding == (WORK,)
    view.set_status(DECODE, decode_status(), view.counted(DECODE))
    assert view.snapshot().decode[0].outstanding == ()
    assert view.snapshot().decode[0].tpot_s == 0.05
    view.release("r", PLACEMENT)
    assert view.snapshot().decode[0].tpot_s is None
    assert view.snapshot().prefill[0].num_outstanding_tokens == 0


def test_a_member_that_has_left_is_no_trouble() -> None:
    view = view_of(DECODE)
    view.apply(Membership(2, ()))
    view.place("r", PLACEMENT, WORK)
    view.admitted("r", PLACEMENT)
    view.set_status(DECODE, decode_status(), view.counted(DECODE))
    view.set_unreachable(DECODE)
    view.release("r", PLACEMENT)
    assert view.records == ()


def test_every_change_is_announced() -> None:
    view = view_of(DECODE)
    for act in (
        lambda: view.set_unreachable(DECODE),
        lambda: view.set_status(DECODE, decode_status(), frozenset()),
        lambda: view.apply(Membership(9, ())),
    ):
        change = view.change()
        act()
        assert change.is_set()
        assert not view.change().is_set()


def test_a_draining_member_takes_no_new_request_and_keeps_what_it_has() -> None:
    view = view_of(DECODE, PREFILL)
    view.place("r", PLACEMENT, WORK)
    view.apply(Membership(2, (DECODE, PREFILL), draining=frozenset({DECODE, PREFILL})))
    assert view.snapshot() == view.candidates((), "") == ClusterSnapshot()
    view.apply(Membership(3, (DECODE, PREFILL)))
    assert view.snapshot().decode[0].outstanding == (WORK,)
    assert len(view.snapshot().prefill) == 1


def test_standbys_are_seen_only_when_asked_for() -> None:
    standby = replace(DECODE, worker_id="p0-standby", is_standby=True)
    view = view_of(DECODE, standby, PREFILL)
    assert [state.member for state in view.snapshot().decode] == [DECODE]
    standbys = view.standbys((), "")
    assert [state.member for state in standbys.decode] == [standby]
    assert standbys.prefill == view.snapshot().prefill
    assert [state.member for state in view.candidates((), "").decode] == [DECODE]
