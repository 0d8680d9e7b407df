"""Ship or compute: the cheapest plan of the model, and what measurements make of a link."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.decode_worker.peer_speeds import PeerSpeeds, Rate, SpeedTable, StreamMeter
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


def test_newer_measurements_count_more() -> None:
    rate = Rate()
    assert rate.per_s is None
    for _ in range(50):
        rate.add(10, 1)
    assert rate.per_s == pytest.approx(10)
    for _ in range(20):
        rate.add(20, 1)
    assert rate.per_s is not None
    assert 18 < rate.per_s < 20


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
    before = replace(speeds.tokens)
    meter.received(layer=0, start=46, num_tokens=30, now=99.1)
    assert speeds.tokens.amount - 0.9 * before.amount == pytest.approx(15)
    assert speeds.tokens.seconds - 0.9 * before.seconds == pytest.approx(0.1)


def test_the_peers_asked_last_are_remembered() -> None:
    table = SpeedTable(max_peers=2)
    first = table.of("a")
    table.of("b")
    assert table.of("a") is first
    table.of("c")
    assert table.of("a") is first
    second = table.of("b")
    assert second == PeerSpeeds(), "it was the one to go"
