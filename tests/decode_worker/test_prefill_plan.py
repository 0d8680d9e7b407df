"""Ship or compute: the cheapest plan of the model, and what measurements make of a link."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from colm_serve.decode_worker.peer_speeds import PeerSpeeds, SpeedTable, StreamMeter
from colm_serve.decode_worker.prefill_plan import (
    LocalLoad,
    PrefillOffer,
    is_asking_worthwhile,
    ship_until,
)

#: 1,000 tokens are missing; either worker computes 1,000 a second.
IDLE = LocalLoad(tokens_per_s=1000.0, num_queued_tokens=0, num_rows=0)
OFFER = PrefillOffer(
    num_cached_tokens=0, num_queued_tokens=0, tokens_per_s=1000.0, link_tokens_per_s=1e6
)


@pytest.mark.parametrize(
    ("local", "offer", "expected"),
    [
        (IDLE, OFFER, 1000),
        (replace(IDLE, tokens_per_s=2100.0), OFFER, 0),
        (replace(IDLE, tokens_per_s=2100.0, num_rows=8), OFFER, 1000),
        (replace(IDLE, num_queued_tokens=1), OFFER, 1000),
        (IDLE, replace(OFFER, num_queued_tokens=900), 1000),
        (IDLE, replace(OFFER, num_queued_tokens=1100), 0),
        (replace(IDLE, num_rows=8), replace(OFFER, num_queued_tokens=1100), 1000),
        (replace(IDLE, num_rows=8), replace(OFFER, num_queued_tokens=8100), 0),
        (IDLE, replace(OFFER, num_queued_tokens=1100, num_cached_tokens=400), 400),
        (IDLE, replace(OFFER, num_queued_tokens=9000, num_cached_tokens=1000), 1000),
        (IDLE, replace(OFFER, num_queued_tokens=9000, num_cached_tokens=2000), 1000),
        (IDLE, replace(OFFER, link_tokens_per_s=400.0), 0),
        (IDLE, replace(OFFER, link_tokens_per_s=400.0, num_cached_tokens=1000), 0),
        (IDLE, replace(OFFER, tokens_per_s=0.0), 1000),
        (IDLE, replace(OFFER, tokens_per_s=0.0, late_s=1.9), 1000),
        (IDLE, replace(OFFER, tokens_per_s=0.0, late_s=2.1), 0),
        (IDLE, replace(OFFER, late_s=0.9), 1000),
        (IDLE, replace(OFFER, late_s=1.1), 0),
        (replace(IDLE, tokens_per_s=None), replace(OFFER, late_s=1e9), 1000),
        (IDLE, replace(OFFER, link_tokens_per_s=None), 1000),
        (replace(IDLE, tokens_per_s=None), replace(OFFER, num_queued_tokens=10**6), 1000),
    ],
)
def test_plans(local: LocalLoad, offer: PrefillOffer, expected: int) -> None:
    assert ship_until(0, 1000, local, offer) == expected


def test_what_is_here_already_counts_for_the_link_only() -> None:
    """A prefill worker without the prefix computes it too: 950 tokens for 50."""
    fast = replace(IDLE, tokens_per_s=1000.0)
    assert ship_until(950, 1000, fast, OFFER) == 950
    assert ship_until(950, 1000, fast, replace(OFFER, num_cached_tokens=940)) == 1000


speeds = st.floats(1.0, 1e6)
loads = st.builds(
    LocalLoad,
    tokens_per_s=speeds,
    num_queued_tokens=st.integers(0, 10_000),
    num_rows=st.integers(0, 64),
)
offers = st.builds(
    PrefillOffer,
    num_cached_tokens=st.integers(0, 120),
    num_queued_tokens=st.integers(0, 10_000),
    tokens_per_s=speeds,
    link_tokens_per_s=st.none() | speeds,
    late_s=st.just(0.0) | st.floats(0, 100),
)
ranges = st.tuples(st.integers(0, 99), st.integers(1, 100)).filter(lambda r: r[0] < r[1])


def delay_s(start: int, split: int, stop: int, local: LocalLoad, offer: PrefillOffer) -> float:
    return offer.delay_s(start, split) + local.delay_s(stop - split)


@given(ranges, loads, offers)
def test_no_split_is_better_than_the_one_chosen(
    missing: tuple[int, int], local: LocalLoad, offer: PrefillOffer
) -> None:
    start, stop = missing
    chosen = delay_s(start, ship_until(start, stop, local, offer), stop, local, offer)
    best = min(delay_s(start, split, stop, local, offer) for split in range(start, stop + 1))
    assert chosen == pytest.approx(best)


wild = st.floats(0, inf, exclude_max=True)


@given(
    ranges,
    st.builds(LocalLoad, st.none() | wild, st.integers(0, 2**64), st.integers(0, 2**64)),
    st.builds(
        PrefillOffer, st.integers(0, 2**64), st.integers(0, 2**64), wild, st.none() | wild, wild
    ),
)
@example((0, 1), IDLE, replace(OFFER, tokens_per_s=5e-324, link_tokens_per_s=1e-323))
@example((0, 99), replace(IDLE, tokens_per_s=0.0), OFFER)
def test_any_speeds_make_a_plan(
    missing: tuple[int, int], local: LocalLoad, offer: PrefillOffer
) -> None:
    start, stop = missing
    assert start <= ship_until(start, stop, local, offer) <= stop
    assert start <= ship_until(start, stop, local, offer.having_come(start, stop)) <= stop


def test_speeds_whose_reciprocals_are_equal_are_taken_for_equal() -> None:
    """There are such neighbours, and a quotient by the difference of their reciprocals."""
    for slow, fast in pairwise([1000.0 + n * 1.2e-13 for n in range(100)]):
        offer = replace(OFFER, tokens_per_s=slow, link_tokens_per_s=fast)
        assert ship_until(0, 1000, IDLE, offer) == 1000


@given(ranges, loads, offers, st.floats(0, 100))
def test_who_is_later_is_waited_for_no_longer(
    missing: tuple[int, int], local: LocalLoad, offer: PrefillOffer, more: float
) -> None:
    later = ship_until(*missing, local, replace(offer, late_s=offer.late_s + more))
    assert later in (missing[0], ship_until(*missing, local, offer))


@given(ranges, offers, st.integers(0, 100), st.integers(0, 100))
def test_what_has_come_brings_the_end_nearer(
    missing: tuple[int, int], offer: PrefillOffer, first: int, more: int
) -> None:
    _, stop = missing
    at, later = min(first, stop), min(first + more, stop)
    assert offer.having_come(later, stop).delay_s(later, stop) <= offer.having_come(
        at, stop
    ).delay_s(at, stop)


@given(ranges, loads, offers, st.integers(0, 10_000))
def test_a_longer_queue_there_never_makes_it_ship_more(
    missing: tuple[int, int], local: LocalLoad, offer: PrefillOffer, more: int
) -> None:
    busier = replace(offer, num_queued_tokens=offer.num_queued_tokens + more)
    # Where computing there is the limit either way; a queue may hide behind a slow link.
    assert ship_until(*missing, local, replace(busier, link_tokens_per_s=None)) <= ship_until(
        *missing, local, replace(offer, link_tokens_per_s=None)
    )


@given(ranges, loads, offers, st.integers(0, 64))
def test_more_rows_here_never_make_it_ship_less(
    missing: tuple[int, int], local: LocalLoad, offer: PrefillOffer, more: int
) -> None:
    busier = replace(local, num_rows=local.num_rows + more)
    assert ship_until(*missing, busier, offer) >= ship_until(*missing, local, offer)


@given(st.integers(1, 1000), loads, offers)
def test_who_is_not_asked_could_not_have_helped(
    num_tokens: int, local: LocalLoad, offer: PrefillOffer
) -> None:
    if not is_asking_worthwhile(num_tokens, local, 0.0, offer.link_tokens_per_s):
        assert ship_until(0, num_tokens, local, offer) == 0


@pytest.mark.parametrize(
    ("local", "round_trip_s", "link", "expected"),
    [
        (IDLE, 0.0, None, True),
        (IDLE, 1.9, None, True),
        (IDLE, 2.1, None, False),
        (IDLE, 0.0, 499.0, False),
        (replace(IDLE, num_rows=9), 2.1, 499.0, True),
        (replace(IDLE, tokens_per_s=None), 1e9, 1e-9, True),
    ],
)
def test_asking(local: LocalLoad, round_trip_s: float, link: float | None, expected: bool) -> None:
    assert is_asking_worthwhile(1000, local, round_trip_s, link) is expected


def test_only_time_in_which_there_was_something_to_send_counts() -> None:
    speeds = PeerSpeeds()
    meter = StreamMeter(speeds, num_layers=2, begin=10.0)
    meter.opened(num_cached_tokens=16, now=10.5)
    assert speeds.round_trip_s == pytest.approx(0.5)
    assert speeds.tokens.per_s is None
    meter.received(layer=0, start=0, num_tokens=16, now=10.6)
    meter.received(layer=1, start=0, num_tokens=16, now=10.7)
    assert speeds.tokens.per_s == pytest.approx(16 / 0.2)
    meter.received(layer=0, start=16, num_tokens=30, now=99.0)
    assert speeds.tokens.per_s == pytest.approx(16 / 0.2), "it waited for the compute"
    expected = replace(speeds.tokens)
    expected.add(15, 0.1)
    meter.received(layer=0, start=46, num_tokens=30, now=99.1)
    assert speeds.tokens.amount == pytest.approx(expected.amount)
    assert speeds.tokens.seconds == pytest.approx(expected.seconds)


def test_the_peers_asked_last_are_remembered() -> None:
    table = SpeedTable(max_peers=2)
    first = table.of("a")
    table.of("b")
    assert table.of("a") is first
    table.of("c")
    assert table.of("a") is first
    second = table.of("b")
    assert second == PeerSpeeds(), "it was the one to go"
