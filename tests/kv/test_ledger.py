"""The page ledger against a model of it that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from colm_serve.errors import ResourceExhausted
from colm_serve.kv.ledger import PageLedger

DIGESTS = [bytes([i]) * 16 for i in range(10)]


class LedgerMachine(RuleBasedStateMachine):
    """Model: how often each page is held, which digest it has, and the idle ones by age."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.ledger = PageLedger(num_pages)
        self.num_pages = num_pages
        self.sequences: list[list[int]] = []
        self.digest_of: dict[int, bytes] = {}
        self.idle: list[int] = []

    def is_held(self, page: int) -> bool:
        return any(page in pages for pages in self.sequences)

    @rule(num_pages=st.integers(0, 13))
    def allocate(self, num_pages: int) -> None:
        untouched = [p for p in range(self.num_pages) if not self.is_held(p)]
        if num_pages > len(untouched):
            with pytest.raises(ResourceExhausted, match=f"{num_pages} KV pages wanted"):
                self.ledger.allocate(num_pages)
            return
        pages = self.ledger.allocate(num_pages)
        assert len(set(pages)) == num_pages
        assert set(pages) <= set(untouched), "a held page was given out again"
        # Only as many idle pages go as are needed, those idle for longest.
        num_evicted = max(0, num_pages - (len(untouched) - len(self.idle)))
        evicted, self.idle = self.idle[:num_evicted], self.idle[num_evicted:]
        for page in evicted:
            del self.digest_of[page]
        assert not set(pages) & set(self.idle), "an idle page went before an older one"
        self.sequences.append(pages)

    @rule(digests=st.lists(st.sampled_from(DIGESTS), max_size=4, unique=True))
    def hold_prefix(self, digests: list[bytes]) -> None:
        page_of = {digest: page for page, digest in self.digest_of.items()}
        expected = []
        for digest in digests:
            if digest not in page_of:
                break
            expected.append(page_of[digest])
        assert self.ledger.hold_prefix(digests) == expected
        self.idle = [page for page in self.idle if page not in expected]
        self.sequences.append(expected)

    @precondition(lambda self: any(self.sequences))
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def publish(self, data: st.DataObject, digest: bytes) -> None:
        held = sorted({page for pages in self.sequences for page in pages})
        page = data.draw(st.sampled_from(held))
        self.ledger.publish(page, digest)
        if digest not in self.digest_of.values():
            self.digest_of.setdefault(page, digest)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.ledger.release(pages)
        for page in reversed(pages):
            if not self.is_held(page) and page in self.digest_of:
                self.idle.append(page)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.sequences))
        self.ledger.withdraw(pages)
        for page in pages:
            self.digest_of.pop(page, None)

    @invariant()
    def agrees(self) -> None:
        self.ledger.check_integrity()
        num_held = sum(self.is_held(page) for page in range(self.num_pages))
        assert self.ledger.num_free == self.num_pages - num_held

    def teardown(self) -> None:
        for pages in getattr(self, "sequences", []):
            self.ledger.release(pages)
        if hasattr(self, "ledger"):
            self.ledger.check_integrity()
            assert self.ledger.num_free == self.num_pages


LedgerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase


def test_neighbouring_pages_are_preferred_to_scattered_ones() -> None:
    ledger = PageLedger(8)
    first, _second, third = ledger.allocate(2), ledger.allocate(2), ledger.allocate(3)
    ledger.release(first)
    ledger.release(third)
    assert ledger.allocate(4) == [4, 5, 6, 7]


def test_scattered_pages_are_given_when_no_neighbours_are_left() -> None:
    ledger = PageLedger(4)
    pages = [ledger.allocate(1) for _ in range(4)]
    ledger.release(pages[0])
    ledger.release(pages[2])
    assert ledger.allocate(2) == [0, 2]


def test_eviction_takes_the_tail_of_a_prefix_before_its_head() -> None:
    ledger = PageLedger(3)
    pages = ledger.allocate(3)
    for page, digest in zip(pages, DIGESTS, strict=False):
        ledger.publish(page, digest)
    ledger.release(pages)
    ledger.release(ledger.allocate(1))
    assert ledger.hold_prefix(DIGESTS[:3]) == pages[:2]


def test_using_a_prefix_again_saves_it_from_eviction() -> None:
    ledger = PageLedger(2)
    for digest in DIGESTS[:2]:
        page = ledger.allocate(1)
        ledger.publish(page[0], digest)
        ledger.release(page)
    ledger.release(ledger.hold_prefix(DIGESTS[:1]))
    ledger.allocate(1)
    assert ledger.hold_prefix(DIGESTS[1:2]) == []
    assert len(ledger.hold_prefix(DIGESTS[:1])) == 1


def test_a_refused_allocation_says_what_was_asked_and_takes_nothing() -> None:
    ledger = PageLedger(4)
    ledger.allocate(3)
    with pytest.raises(ResourceExhausted, match="2 KV pages wanted, 1 of 4 free"):
        ledger.allocate(2)
    assert ledger.num_free == 1
    ledger.check_integrity()


def test_releasing_twice_is_caught() -> None:
    ledger = PageLedger(2)
    pages = ledger.allocate(1)
    ledger.release(pages)
    with pytest.raises(AssertionError, match="not held"):
        ledger.release(pages)


def test_integrity_check_sees_damage() -> None:
    """The detector itself: each kind of corruption that it names is found."""
    lost = PageLedger(2)
    lost._is_free[1] = 0
    free_and_held = PageLedger(2)
    free_and_held._num_holders[0] = 1
    stale_digest = PageLedger(2)
    stale_digest._digest_of[0] = DIGESTS[0]
    miscounted = PageLedger(2)
    miscounted._num_uncached = 1
    for ledger in (lost, free_and_held, stale_digest, miscounted):
        with pytest.raises(AssertionError):
            ledger.check_integrity()
