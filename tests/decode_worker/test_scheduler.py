"""The decode scheduler: admission, turns, sharing, and pages under any history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from colm_serve.core import DecodeRequest, FinishReason, SamplingParams
from colm_serve.decode_worker.scheduler import DecodeScheduler, LocalChunk, Sequence, Stage
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.kv.ledger import PageLedger

PAGE_SIZE = 4
EOS = 9


def make_request(
    prompt: Seq[int], max_tokens: int = 4, level: int = 1, *, ignore_eos: bool = False
) -> DecodeRequest:
    sampling = SamplingParams(max_tokens, temperature=0, ignore_eos=ignore_eos)
    return DecodeRequest("r", tuple(prompt), level, sampling, (), "weights")


def make_scheduler(
    num_pages: int = 64, max_rows: int = 4, max_waiting: int = 8, root: bytes = b"weights"
) -> DecodeScheduler:
    return DecodeScheduler(
        PageLedger(num_pages),
        page_size=PAGE_SIZE,
        max_rows=max_rows,
        max_waiting=max_waiting,
        chunk_tokens=10,
        eos_token_ids=(EOS,),
        cache_root=root,
    )


def ship_and_start(scheduler: DecodeScheduler, sequence: Sequence) -> Sequence:
    sequence.num_computed = sequence.num_prefill
    scheduler.start(sequence)
    return sequence


def run_to_end(scheduler: DecodeScheduler, sequence: Sequence, token: int = 1) -> None:
    while sequence.stage is not Stage.FINISHED:
        rows = scheduler.next_rows()
        scheduler.complete_rows((token,) * len(rows))


def test_admission_reserves_prompt_and_output() -> None:
    scheduler = make_scheduler(num_pages=3)
    sequence = scheduler.admit(make_request([1] * 7, max_tokens=3))
    assert len(sequence.pages) == 3
    assert (sequence.num_prefill, sequence.num_missing) == (6, 6)
    with pytest.raises(ResourceExhausted, match="1 KV pages wanted, 0 of 3 free"):
        scheduler.admit(make_request([1], max_tokens=1))
    scheduler.cancel(sequence)
    scheduler.admit(make_request([1], max_tokens=1))


def test_what_fits_no_empty_pool_is_refused_for_good() -> None:
    with pytest.raises(InvalidArgument, match="max_tokens"):
        make_scheduler(num_pages=3).admit(make_request([1] * 8, max_tokens=5))


def test_too_many_waiting_are_refused() -> None:
    scheduler = make_scheduler(max_waiting=2)
    first, _ = scheduler.admit(make_request([1])), scheduler.admit(make_request([1]))
    with pytest.raises(ResourceExhausted, match="2 requests are already waiting"):
        scheduler.admit(make_request([1]))
    ship_and_start(scheduler, first)
    scheduler.admit(make_request([1]))


def test_a_refused_admission_lets_go_of_the_prefix_it_found() -> None:
    scheduler = make_scheduler(num_pages=4)
    run_to_end(scheduler, ship_and_start(scheduler, scheduler.admit(make_request([1] * 9, 1))))
    blocker = scheduler.admit(make_request([2] * 4, 2))
    with pytest.raises(ResourceExhausted):
        scheduler.admit(make_request([1] * 12, 4))
    scheduler.cancel(blocker)
    scheduler.check_integrity()
    assert scheduler.admit(make_request([1] * 12, 4)).num_cached > 0


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (13, 8)]
)
def test_whole_blocks_before_the_last_token_are_shared(num_tokens: int, num_cached: int) -> None:
    scheduler = make_scheduler()
    first = ship_and_start(scheduler, scheduler.admit(make_request(range(20, 29))))
    second = scheduler.admit(make_request(range(20, 20 + num_tokens)))
    assert second.num_cached == num_cached
    shared = num_cached // PAGE_SIZE
    assert second.pages[:shared] == first.pages[:shared]
    assert not set(second.pages[shared:]) & set(first.pages)


def test_kv_that_has_not_come_is_not_shared() -> None:
    scheduler = make_scheduler()
    scheduler.admit(make_request([5] * 9))
    assert scheduler.admit(make_request([5] * 9)).num_cached == 0


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    first = ship_and_start(scheduler, scheduler.admit(make_request([5] * 6, max_tokens=6)))
    run_to_end(scheduler, first, token=3)
    # 12 tokens fill three blocks, but the last was never run: two have all of their KV.
    assert scheduler.admit(make_request([5] * 6 + [3] * 6 + [8])).num_cached == 8


@pytest.mark.parametrize(
    ("token", "ignore_eos", "reason"),
    [
        (EOS, False, FinishReason.STOP),
        (EOS, True, FinishReason.LENGTH),
        (1, False, FinishReason.LENGTH),
    ],
)
def test_why_a_sequence_ends(token: int, ignore_eos: bool, reason: FinishReason) -> None:
    scheduler = make_scheduler()
    request = make_request([1, 2], max_tokens=2, ignore_eos=ignore_eos)
    ship_and_start(scheduler, scheduler.admit(request))
    reasons = []
    while scheduler.has_work:
        rows = scheduler.next_rows()
        reasons += [why for _, why in scheduler.complete_rows((token,) * len(rows))]
    assert reasons[-1] is reason
    assert reasons[:-1] == [None] * (0 if reason is FinishReason.STOP else 1)


def test_rows_stand_highest_level_first() -> None:
    scheduler = make_scheduler()
    for level in (1, 3, 2, 3):
        ship_and_start(scheduler, scheduler.admit(make_request([1], level=level)))
    assert [row.level for row in scheduler.next_rows()] == [3, 3, 2, 1]
    assert scheduler.num_running(3) == (1, 1, 2)


@given(st.integers(1, 5), st.integers(1, 14), st.data())
def test_all_sequences_take_turns(max_rows: int, num_sequences: int, data: st.DataObject) -> None:
    scheduler = make_scheduler(max_rows=max_rows, max_waiting=20)
    sequences = []
    for _ in range(num_sequences):
        level = data.draw(st.integers(1, 3))
        sequence = scheduler.admit(make_request([1], max_tokens=15, level=level))
        sequences.append(ship_and_start(scheduler, sequence))
    for _ in range(10):
        rows = scheduler.next_rows()
        assert len(rows) == min(max_rows, num_sequences)
        scheduler.complete_rows((1,) * len(rows))
        lengths = Counter(len(sequence.tokens) for sequence in sequences)
        assert max(lengths) - min(lengths) <= 1, "one is starved"


def test_local_chunks_are_computed_in_order_within_the_budget() -> None:
    scheduler = make_scheduler()
    first, second = scheduler.admit(make_request([1] * 8)), scheduler.admit(make_request([2] * 14))
    for sequence in (first, second):
        scheduler.compute_here(sequence)
    chunks = scheduler.next_chunks()
    assert chunks == (LocalChunk(first, 7), LocalChunk(second, 3))
    assert scheduler.complete_chunks(chunks) == [first]
    chunks = scheduler.next_chunks()
    assert chunks == (LocalChunk(second, 10),)
    assert scheduler.complete_chunks(chunks) == [second]
    assert not scheduler.has_work


def test_a_sequence_in_a_pass_keeps_its_pages_until_the_pass_ends() -> None:
    scheduler = make_scheduler(num_pages=2)
    sequence = ship_and_start(scheduler, scheduler.admit(make_request([1], max_tokens=7)))
    scheduler.next_rows()
    scheduler.cancel(sequence)
    with pytest.raises(ResourceExhausted):
        scheduler.admit(make_request([1], max_tokens=1))
    assert scheduler.complete_rows((1,)) == []
    scheduler.admit(make_request([1], max_tokens=7))


class SchedulerMachine(RuleBasedStateMachine):
    """Sequences come with few distinct prompts, so prefixes are shared, and leave at any time."""

    @initialize(num_pages=st.integers(2, 14), max_rows=st.integers(1, 4))
    def begin(self, num_pages: int, max_rows: int) -> None:
        self.max_rows = max_rows
        self.ledger = PageLedger(num_pages)
        self.scheduler = DecodeScheduler(
            self.ledger, page_size=PAGE_SIZE, max_rows=max_rows, max_waiting=5, chunk_tokens=10,
            eos_token_ids=(EOS,), cache_root=b"weights",
        )  # fmt: skip
        self.live: list[Sequence] = []
        self.rows: tuple[Sequence, ...] | None = None
        self.chunks: tuple[LocalChunk, ...] | None = None
        # The truth about the memory: which prefix the KV in (page, slot) was computed from.
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.writing: dict[tuple[int, int], tuple[int, ...]] = {}
        self.writers: dict[int, list[Sequence]] = {}

    @property
    def is_in_pass(self) -> bool:
        return self.rows is not None or self.chunks is not None

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        max_tokens=st.integers(1, 12),
        level=st.integers(1, 3),
    )
    def admit(self, prompt: list[int], max_tokens: int, level: int) -> None:
        num_free = self.ledger.num_free
        try:
            sequence = self.scheduler.admit(make_request(prompt, max_tokens, level))
        except (ResourceExhausted, InvalidArgument):
            assert self.ledger.num_free == num_free
            return
        self.live.append(sequence)
        cached = self.places(sequence, 0, sequence.num_cached)
        assert all(self.memory.get(place) == prefix for place, prefix in cached.items())

    def places(
        self, sequence: Sequence, start: int, stop: int
    ) -> dict[tuple[int, int], tuple[int, ...]]:
        """Where tokens [start, stop) have their KV, and the prefix that each is computed from."""
        return {
            (sequence.pages[t // PAGE_SIZE], t % PAGE_SIZE): tuple(sequence.tokens[: t + 1])
            for t in range(start, stop)
        }

    def begin_writing(self, sequence: Sequence, num_tokens: int) -> None:
        start = sequence.num_computed
        for place, prefix in self.places(sequence, start, start + num_tokens).items():
            self.writing[place] = prefix
            self.writers.setdefault(place[0], []).append(sequence)

    def end_writing(self) -> None:
        """What a pass writes is written, cancelled or not."""
        self.memory.update(self.writing)
        self.writing, self.writers = {}, {}

    def awaiting(self) -> list[Sequence]:
        local = {id(s) for s in self.scheduler._local.values()}
        return [s for s in self.live if s.stage is Stage.AWAITING_KV and id(s) not in local]

    @precondition(lambda self: self.awaiting())
    @rule(data=st.data(), num_tokens=st.integers(1, 14))
    def ship(self, data: st.DataObject, num_tokens: int) -> None:
        sequence = data.draw(st.sampled_from(self.awaiting()))
        stop = min(sequence.num_prefill, sequence.num_computed + num_tokens)
        self.memory.update(self.places(sequence, sequence.num_computed, stop))
        sequence.num_computed = stop
        if sequence.num_missing == 0:
            self.scheduler.start(sequence)

    @precondition(lambda self: any(s.num_missing for s in self.awaiting()))
    @rule(data=st.data())
    def compute_here(self, data: st.DataObject) -> None:
        missing = [s for s in self.awaiting() if s.num_missing]
        self.scheduler.compute_here(data.draw(st.sampled_from(missing)))

    @precondition(lambda self: not self.is_in_pass)
    @rule()
    def begin_rows(self) -> None:
        self.rows = self.scheduler.next_rows()
        assert len(self.rows) <= self.max_rows
        assert [s.level for s in self.rows] == sorted((s.level for s in self.rows), reverse=True)
        for sequence in self.rows:
            self.begin_writing(sequence, 1)

    @precondition(lambda self: self.rows is not None)
    @rule(token=st.sampled_from([1, 2, EOS]))
    def end_rows(self, token: int) -> None:
        assert self.rows is not None
        self.end_writing()
        outcome = self.scheduler.complete_rows((token,) * len(self.rows))
        self.rows = None
        ended = [id(s) for s, reason in outcome if reason is not None]
        self.live = [s for s in self.live if id(s) not in ended]

    @precondition(lambda self: not self.is_in_pass)
    @rule()
    def begin_chunks(self) -> None:
        self.chunks = self.scheduler.next_chunks()
        assert sum(chunk.num_tokens for chunk in self.chunks) <= 10
        for chunk in self.chunks:
            self.begin_writing(chunk.sequence, chunk.num_tokens)

    @precondition(lambda self: self.chunks is not None)
    @rule()
    def end_chunks(self) -> None:
        assert self.chunks is not None
        self.end_writing()
        complete = self.scheduler.complete_chunks(self.chunks)
        self.chunks = None
        for sequence in complete:
            self.scheduler.start(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.scheduler.cancel(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @invariant()
    def is_sound(self) -> None:
        self.scheduler.check_integrity()
        owners: dict[int, list[Sequence]] = {}
        for sequence in self.live:
            assert len(sequence.pages) == len(set(sequence.pages))
            for page in sequence.pages:
                owners.setdefault(page, []).append(sequence)
        for page, sharing in owners.items():
            if len(sharing) > 1:
                self.check_shared(page, sharing)

    def check_shared(self, page: int, sharing: list[Sequence]) -> None:
        """A page has two owners only as the same block of the same prefix."""
        blocks = {sequence.pages.index(page) for sequence in sharing}
        assert len(blocks) == 1, "a page stands at two places"
        stop = (blocks.pop() + 1) * PAGE_SIZE
        assert len({tuple(sequence.tokens[:stop]) for sequence in sharing}) == 1
        assert all(sequence.num_computed >= stop for sequence in sharing), "it is written still"

    @invariant()
    def nothing_being_written_is_anothers(self) -> None:
        for page, writers in self.writers.items():
            owners = [s for s in self.live if page in s.pages]
            assert all(owner is writers[0] for owner in (*owners, *writers))

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        for sequence in self.live:
            self.scheduler.cancel(sequence)
        if self.rows is not None:
            self.scheduler.complete_rows((1,) * len(self.rows))
        if self.chunks is not None:
            self.scheduler.complete_chunks(self.chunks)
        self.scheduler.check_integrity()
        assert self.ledger.num_free == self.ledger.num_pages
        assert not self.scheduler.has_work
        assert self.scheduler.num_waiting == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
