"""How long a prompt's keys and values are waited for: by words, times and the cost of not to."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import KvLayout
from colm_serve.decode_worker.peer_speeds import PeerSpeeds
from colm_serve.decode_worker.prefill_plan import LocalLoad
from colm_serve.decode_worker.shipment import MIN_PATIENCE_S, Shipment
from colm_serve.transport.kv_frames import KvFrame, OpenFrame, Progress, WaitFrame

LAYOUT = KvLayout(1, 1, 1, "float32")
STOP = 1000


@dataclass
class Here:
    """What computing one token here takes; twice, as a row that is to come is delayed too."""

    tokens_per_s: float | None = 1000.0

    def load(self) -> LocalLoad:
        return LocalLoad(self.tokens_per_s, num_queued_tokens=0, num_rows=1)


def opening(num_queued: int, tokens_per_s: float, num_cached: int = 0) -> OpenFrame:
    return OpenFrame(0, 1, "", LAYOUT, "raw", "message", num_cached, num_queued, tokens_per_s)


def wait(num_computed: int, num_queued: int, tokens_per_s: float = 1000.0) -> WaitFrame:
    return WaitFrame(1, Progress(num_computed, num_queued, tokens_per_s))


def begun(here: Here) -> Shipment:
    return Shipment(STOP, here.load, PeerSpeeds(), begin=100.0)


def test_a_worker_that_is_never_heard_of_is_left_once_it_is_later_than_computing_here() -> None:
    shipment = begun(Here(1e6))
    assert (shipment.until, shipment.due) == (inf, 100.0 + MIN_PATIENCE_S)
    shipment.decide(0, shipment.due)
    assert shipment.until == 0


def test_the_opening_decides_and_says_when_to_decide_again() -> None:
    shipment = begun(Here())
    shipment.note(opening(0, 1000.0), 0, 100.1)
    assert shipment.until == inf
    assert shipment.due == pytest.approx(102.1), "twice its 1 s"
    shipment = begun(Here())
    shipment.note(opening(5000, 1000.0), 0, 100.1)
    assert shipment.until == 0, "6 s there, 2 s here"


def test_a_queue_that_grows_sends_the_prompt_back() -> None:
    shipment = begun(Here())
    shipment.note(opening(0, 1000.0), 0, 100.0)
    shipment.note(wait(0, 500), 0, 100.2)
    assert shipment.until == inf, "1.5 s there, and 0.2 s late"
    shipment.note(wait(0, 900), 0, 100.3)
    assert shipment.until == 0


def test_a_worker_that_slows_down_is_left() -> None:
    shipment = begun(Here())
    shipment.note(opening(0, 1e6), 0, 100.0)
    shipment.note(wait(100, 0, tokens_per_s=300.0), 0, 100.05)
    assert shipment.until == 100, "what it has computed comes at once"


def test_who_makes_the_progress_that_was_predicted_is_waited_for() -> None:
    shipment = begun(Here(600.0))
    shipment.note(opening(1000, 1000.0), 0, 100.0)
    for step in range(1, 20):
        shipment.note(wait(50 * step, 1000 - 50 * step), 0, 100.0 + 0.1 * step)
        assert shipment.until == inf


def test_tokens_that_come_are_progress_too() -> None:
    """Nothing is said of the queue meanwhile, which shrinks with what is left."""
    shipment = begun(Here())
    shipment.note(opening(800, 1000.0), 0, 100.0)
    due = shipment.due
    shipment.note(KvFrame(1, 0, 0, 900), 900, 101.62)
    assert shipment.due == due
    shipment.decide(900, 101.62)
    assert shipment.until == inf


def test_a_worker_whose_word_does_not_hold_is_left_at_a_bounded_cost() -> None:
    """It says that it is all but done, again and again."""
    shipment = begun(Here())
    now = 100.0
    shipment.note(opening(0, 1e6), 0, now)
    while shipment.until == inf:
        now += 0.25
        shipment.note(wait(0, 0, 1e6), 0, now)
    assert now - 100.0 <= 2.25, "computing here takes 2 s"


@given(
    local_s=st.floats(1e-3, 1e3),
    speed=st.floats(1.0, 1e7),
    num_queued=st.integers(0, 10_000),
    has_opened=st.booleans(),
)
def test_a_worker_that_hangs_costs_a_few_times_what_computing_here_does(
    local_s: float, speed: float, num_queued: int, has_opened: bool
) -> None:
    shipment, now = begun(Here(2 * STOP / local_s)), 100.0
    if has_opened:
        shipment.note(opening(num_queued, speed), 0, now)
    while shipment.until == inf:
        assert shipment.due > now
        now = shipment.due
        shipment.decide(0, now)
    assert now - 100.0 <= MIN_PATIENCE_S + 4 * local_s


def test_an_end_frame_alone_is_not_waited_for() -> None:
    shipment = begun(Here(None))
    shipment.note(opening(0, 1000.0), 0, 100.0)
    shipment.note(KvFrame(1, 0, 0, STOP), STOP, 100.9)
    assert shipment.until == inf
    shipment.decide(STOP, shipment.due)
    assert shipment.until == STOP


def test_where_the_speed_here_is_unknown_it_is_waited_for_to_the_frame_timeout() -> None:
    shipment = begun(Here(None))
    for _ in range(20):
        shipment.decide(0, shipment.due)
        assert shipment.until == inf


@given(
    st.lists(
        st.tuples(st.integers(0, 1200), st.integers(0, 2**64), st.floats(0, 1e9), st.floats(0, 9)),
        max_size=8,
    )
)
def test_whatever_is_said_a_decision_is_made(
    words: list[tuple[int, int, float, float]],
) -> None:
    shipment, now, num_complete = begun(Here()), 100.0, 0
    shipment.note(opening(0, 0.0), 0, now)
    for num_computed, num_queued, speed, seconds in words:
        now += seconds
        num_complete = max(num_complete, min(num_computed, STOP) // 2)
        shipment.note(wait(num_computed, num_queued, speed), num_complete, now)
        assert shipment.until == inf or num_complete <= shipment.until < STOP
        assert shipment.due >= now + MIN_PATIENCE_S


def test_a_wait_frame_of_an_older_peer_decides_nothing() -> None:
    shipment = begun(Here())
    shipment.note(opening(0, 1000.0), 0, 100.0)
    due = shipment.due
    shipment.note(WaitFrame(1), 0, 150.0)
    assert (shipment.until, shipment.due) == (inf, due)
