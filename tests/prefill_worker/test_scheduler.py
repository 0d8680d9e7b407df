"""The prefill scheduler: shares, order, bounds, and pages under any history."""

from __future__ import annotations

from collections.abc import Sequence

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

from colm_serve.core import KvLayout, PrefillRequest
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.kv.ledger import PageLedger
from colm_serve.prefill_worker.scheduler import PrefillJob, PrefillScheduler, ScheduledChunk

LAYOUT = KvLayout(1, 1, 1, "float32")
PAGE_SIZE = 4


def make_request(num_tokens: int) -> PrefillRequest:
    return PrefillRequest("r", (0,) * num_tokens, 0, "weights", LAYOUT, stream_id=0)


def make_scheduler(
    num_pages: int = 64, chunk_tokens: int = 12, max_queued: int = 4
) -> PrefillScheduler:
    return PrefillScheduler(
        PageLedger(num_pages), page_size=PAGE_SIZE, chunk_tokens=chunk_tokens, max_queued=max_queued
    )


def run_pass(scheduler: PrefillScheduler) -> dict[int, int]:
    """Tokens of the next pass by job."""
    chunks = scheduler.next_chunks()
    scheduler.complete_pass()
    return {id(chunk.job): chunk.num_tokens for chunk in chunks}


@pytest.mark.parametrize(
    ("lengths", "shares"),
    [
        ([5], [5]),
        ([100], [12]),
        ([100, 100], [6, 6]),
        ([100, 100, 100], [4, 4, 4]),
        ([100, 2], [10, 2]),
        ([2, 100], [2, 10]),
        ([1, 4, 100], [1, 4, 7]),
        ([100, 100, 100, 100, 100], [2, 2, 2, 3, 3]),
        ([1] * 14, [1] * 12 + [0, 0]),
        ([100] * 14, [1] * 12 + [0, 0]),
    ],
)
def test_the_budget_is_shared_equally(lengths: list[int], shares: list[int]) -> None:
    scheduler = make_scheduler(num_pages=1000)
    jobs = [scheduler.submit(make_request(n)) for n in lengths]
    tokens = run_pass(scheduler)
    assert [tokens.get(id(job), 0) for job in jobs] == shares


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 40))
def test_a_pass_uses_the_whole_budget_and_never_more(lengths: list[int], chunk_tokens: int) -> None:
    scheduler = make_scheduler(num_pages=1000, chunk_tokens=chunk_tokens)
    jobs = [scheduler.submit(make_request(n)) for n in lengths]
    num_left = sum(lengths)
    while num_left:
        tokens = run_pass(scheduler)
        assert sum(tokens.values()) == min(chunk_tokens, num_left)
        num_left -= sum(tokens.values())
        assert scheduler.num_queued_tokens == num_left
    assert run_pass(scheduler) == {}
    assert all(job.num_left == 0 for job in jobs)


@given(st.lists(st.integers(1, 60), min_size=2, max_size=12))
def test_whoever_gets_less_than_another_needs_no_more(lengths: list[int]) -> None:
    scheduler = make_scheduler(num_pages=1000, chunk_tokens=40)
    jobs = [scheduler.submit(make_request(n)) for n in lengths]
    tokens = run_pass(scheduler)
    most = max(tokens.values())
    for job in jobs:
        # Integer division leaves a remainder of less than a token a job, which the last take.
        assert tokens[id(job)] >= most - len(jobs) or job.num_left == 0


@pytest.mark.parametrize("num_long", [1, 3])
def test_a_short_prompt_does_not_wait_for_long_ones(num_long: int) -> None:
    scheduler = make_scheduler(num_pages=1000)
    for _ in range(num_long):
        scheduler.submit(make_request(1000))
    run_pass(scheduler)
    short = scheduler.submit(make_request(3))
    run_pass(scheduler)
    assert short.num_left == 0


def test_pages_are_given_in_order_of_arrival() -> None:
    """A long prompt that waits for pages is not overtaken by a short one that would fit."""
    scheduler = make_scheduler(num_pages=4)
    first = scheduler.submit(make_request(12))
    long = scheduler.submit(make_request(16))
    short = scheduler.submit(make_request(4))
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    assert id(short) not in run_pass(scheduler)
    scheduler.finish(first)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    assert len(long.pages) == 4
    scheduler.finish(long)
    assert len(short.pages) == 1
    scheduler.check_integrity()


def test_a_prompt_larger_than_the_pool_is_refused_for_good() -> None:
    scheduler = make_scheduler(num_pages=4)
    with pytest.raises(InvalidArgument, match=r"token_ids: '17 tokens'.*up to 16"):
        scheduler.submit(make_request(17))
    assert scheduler.submit(make_request(16)).pages


def test_a_full_queue_refuses_and_takes_again_once_there_is_room() -> None:
    scheduler = make_scheduler(num_pages=1, max_queued=2)
    jobs = [scheduler.submit(make_request(4)) for _ in range(3)]
    with pytest.raises(ResourceExhausted, match="2 prompts are already waiting"):
        scheduler.submit(make_request(4))
    scheduler.finish(jobs[1])
    scheduler.submit(make_request(4))
    scheduler.check_integrity()


def test_pages_stay_until_the_receiver_has_everything() -> None:
    scheduler = make_scheduler()
    job = scheduler.submit(make_request(8))
    run_pass(scheduler)
    assert (job.num_left, len(job.pages)) == (0, 2)
    scheduler.finish(job)
    assert job.pages == []


def test_pages_of_a_job_in_a_pass_are_kept_until_it_ends() -> None:
    scheduler = make_scheduler(num_pages=2)
    job = scheduler.submit(make_request(8))
    scheduler.next_chunks()
    scheduler.finish(job)
    waiting = scheduler.submit(make_request(4))
    assert waiting.pages == [], "a page that is being written was given to another"
    scheduler.complete_pass()
    assert len(waiting.pages) == 1
    scheduler.check_integrity()


def test_finishing_twice_frees_once() -> None:
    scheduler = make_scheduler()
    job = scheduler.submit(make_request(8))
    scheduler.finish(job)
    scheduler.finish(job)
    scheduler.check_integrity()


class SchedulerMachine(RuleBasedStateMachine):
    """Jobs come, are computed, and are finished at any time, a pass under way or not."""

    @initialize(num_pages=st.integers(1, 12), chunk_tokens=st.integers(1, 20))
    def start(self, num_pages: int, chunk_tokens: int) -> None:
        self.num_pages, self.chunk_tokens = num_pages, chunk_tokens
        self.scheduler = make_scheduler(num_pages, chunk_tokens)
        self.jobs: list[PrefillJob] = []
        self.in_pass: Sequence[ScheduledChunk] | None = None
        self.pages_in_pass: set[int] = set()

    @rule(num_tokens=st.integers(1, 60))
    def submit(self, num_tokens: int) -> None:
        try:
            self.jobs.append(self.scheduler.submit(make_request(num_tokens)))
        except InvalidArgument:
            assert num_tokens > self.num_pages * PAGE_SIZE
        except ResourceExhausted:
            assert self.scheduler.num_waiting == 4

    @precondition(lambda self: self.in_pass is None)
    @rule()
    def begin_pass(self) -> None:
        self.in_pass = self.scheduler.next_chunks()
        assert sum(chunk.num_tokens for chunk in self.in_pass) <= self.chunk_tokens
        assert all(0 < chunk.num_tokens <= chunk.job.num_left for chunk in self.in_pass)
        wanting = [job for job in self.jobs if job.pages and job.num_left]
        assert bool(self.in_pass) == bool(wanting), "work was left lying"
        self.pages_in_pass = {page for chunk in self.in_pass for page in chunk.job.pages}

    @precondition(lambda self: self.in_pass is not None)
    @rule()
    def complete_pass(self) -> None:
        self.in_pass, self.pages_in_pass = None, set()
        self.scheduler.complete_pass()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.jobs) - 1))
        self.scheduler.finish(self.jobs.pop(index))

    @invariant()
    def is_sound(self) -> None:
        self.scheduler.check_integrity()
        held = [page for job in self.jobs for page in job.pages]
        assert len(held) == len(set(held)), "two jobs have the same page"
        others = {
            page
            for job in self.jobs
            for page in job.pages
            if all(chunk.job is not job for chunk in self.in_pass or ())
        }
        assert not others & self.pages_in_pass, "a page being written went to another job"

    def teardown(self) -> None:
        if not hasattr(self, "jobs"):
            return
        self.scheduler.complete_pass()
        for job in self.jobs:
            self.scheduler.finish(job)
        self.scheduler.check_integrity()
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.scheduler.num_queued_tokens == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
