"""The prefill scheduler: shares, order, bounds, and pages under any history."""

from __future__ import annotations

import itertools
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
from colm_serve.prefill_worker.job import PrefillJob
from colm_serve.prefill_worker.pages import LedgerPages
from colm_serve.prefill_worker.scheduler import PrefillScheduler, ScheduledChunk

LAYOUT = KvLayout(1, 1, 1, "float32")
PAGE_SIZE = 4


token_ids = itertools.count()


def make_request(
    num_tokens: int, token_id: int | None = None, ship_from: int = 0, salt: str = ""
) -> PrefillRequest:
    """A prompt of one token over and over; by default no other prompt has it."""
    tokens = (next(token_ids) if token_id is None else token_id,) * num_tokens
    return PrefillRequest("r", tokens, ship_from, "weights", LAYOUT, 0, salt)


def make_scheduler(
    num_pages: int = 64, chunk_tokens: int = 12, max_queued: int = 4
) -> PrefillScheduler:
    return PrefillScheduler(
        LedgerPages(PageLedger(num_pages), PAGE_SIZE, b"weights"),
        chunk_tokens=chunk_tokens,
        max_queued=max_queued,
    )


def run_pass(
    scheduler: PrefillScheduler, now: float = 0.0, tokens_per_s: float = 0.0
) -> dict[PrefillJob, int]:
    """Tokens of the next pass by job."""
    chunks = scheduler.next_chunks(now, tokens_per_s)
    scheduler.complete_pass()
    return {chunk.job: chunk.num_tokens for chunk in chunks}


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
    assert [tokens.get(job, 0) for job in jobs] == shares


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
        assert tokens[job] >= most - len(jobs) or job.num_left == 0


@pytest.mark.parametrize("num_long", [1, 3])
def test_a_short_prompt_does_not_wait_for_long_ones(num_long: int) -> None:
    scheduler = make_scheduler(num_pages=1000)
    for _ in range(num_long):
        scheduler.submit(make_request(1000))
    run_pass(scheduler)
    short = scheduler.submit(make_request(3))
    run_pass(scheduler)
    assert short.num_left == 0


def test_more_jobs_than_tokens_take_turns() -> None:
    scheduler = make_scheduler(num_pages=1000, chunk_tokens=2)
    jobs = [scheduler.submit(make_request(2)) for _ in range(4)]
    for _ in range(2):
        run_pass(scheduler)
    assert [job.num_computed for job in jobs] == [1] * 4


def test_half_a_pass_goes_to_who_would_else_be_late() -> None:
    scheduler = make_scheduler(num_pages=1000)
    late, second, first, easy = (
        scheduler.submit(make_request(100), deadline) for deadline in (9.9, 30.0, 20.0, 40.0)
    )
    # At 10 tokens/s each takes 10 s alone, which is too late for one, and 40 s by equal shares.
    tokens = run_pass(scheduler, now=0.0, tokens_per_s=10.0)
    assert tokens == {late: 1, second: 1, first: 2 + 6, easy: 2}


def test_deadlines_do_not_count_while_the_speed_is_unknown() -> None:
    scheduler = make_scheduler(num_pages=1000)
    jobs = [scheduler.submit(make_request(100), deadline) for deadline in (None, 1.0, 90.0)]
    assert run_pass(scheduler) == dict.fromkeys(jobs, 4)


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.none() | st.floats(0, 50)), min_size=1, max_size=10
    ),
    st.floats(0, 50),
)
def test_deadlines_take_half_of_nobodys_share(
    prompts: list[tuple[int, float | None]], now: float
) -> None:
    scheduler = make_scheduler(num_pages=20_000, chunk_tokens=64, max_queued=10)
    jobs = [scheduler.submit(make_request(n), deadline) for n, deadline in prompts]
    tokens = run_pass(scheduler, now, tokens_per_s=100.0)
    assert sum(tokens.values()) == min(64, sum(n for n, _ in prompts))
    for job, (num_tokens, _) in zip(jobs, prompts, strict=True):
        assert tokens[job] >= min(num_tokens, 32 // len(jobs))


def test_an_early_deadline_is_kept_that_equal_shares_would_miss() -> None:
    """Played out: 10 prompts at 100 tokens/s, one of which is due after 5 s."""
    scheduler = make_scheduler(num_pages=20_000, chunk_tokens=20, max_queued=10)
    due = scheduler.submit(make_request(200), 5.0)
    for _ in range(9):
        scheduler.submit(make_request(1000), 1000.0)
    now = 0.0
    while due.num_left:
        due.num_sent = due.num_computed
        now += sum(run_pass(scheduler, now, tokens_per_s=100.0).values()) / 100.0
    assert now <= 5.0


def test_a_job_whose_receiver_lags_has_what_others_leave() -> None:
    scheduler = make_scheduler(num_pages=1000)
    lagging = scheduler.submit(make_request(1000))
    for _ in range(4):
        assert run_pass(scheduler) == {lagging: 12}
    assert run_pass(scheduler) == {lagging: 12}, "nobody else wants the time"
    other = scheduler.submit(make_request(30))
    assert run_pass(scheduler) == {other: 12}
    lagging.num_sent = 40
    assert run_pass(scheduler) == {lagging: 6, other: 6}
    assert run_pass(scheduler) == {lagging: 6, other: 6}
    lagging.num_sent = 10
    assert run_pass(scheduler) == {other: 6, lagging: 6}, "what the other one does not need"


def test_what_is_not_asked_for_does_not_lag() -> None:
    scheduler = make_scheduler(num_pages=1000)
    job = scheduler.submit(make_request(1000, ship_from=900))
    scheduler.submit(make_request(1000))
    for _ in range(10):
        run_pass(scheduler)
    assert job.num_computed == 8 * 6 + 2 * 12, "the other one lags after 8 passes"


def test_a_short_prompt_overtakes_a_long_one_that_waits_for_pages() -> None:
    scheduler = make_scheduler(num_pages=4)
    first = scheduler.submit(make_request(12))
    long = scheduler.submit(make_request(16))
    short = scheduler.submit(make_request(4))
    assert (first.pages, long.pages, short.pages) == ((0, 1, 2), (), (3,))
    assert short in run_pass(scheduler)
    scheduler.finish(first)
    assert long.pages == ()
    scheduler.finish(short)
    assert len(long.pages) == 4
    scheduler.finish(long)
    scheduler.check_integrity()


def test_a_long_prompt_is_overtaken_by_its_own_size_at_most() -> None:
    scheduler = make_scheduler(num_pages=4, max_queued=10)
    first = scheduler.submit(make_request(4))
    long = scheduler.submit(make_request(16))
    shorts = [scheduler.submit(make_request(4)) for _ in range(6)]
    for short in shorts[:4]:
        assert short.pages, "overtakes"
        scheduler.finish(short)
    assert [short.pages for short in shorts[4:]] == [(), ()]
    scheduler.finish(first)
    assert len(long.pages) == 4
    scheduler.finish(long)
    assert all(short.pages for short in shorts[4:])


@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=30),
    finish_first=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_nobody_is_overtaken_by_more_pages_than_its_own(
    lengths: list[int], finish_first: list[bool]
) -> None:
    """Whatever the order in which those with pages end, which all do at some time."""
    scheduler = make_scheduler(num_pages=10, max_queued=30)
    jobs = [scheduler.submit(make_request(n)) for n in lengths]
    num_pages = {job: -(-job.num_tokens // PAGE_SIZE) for job in jobs}
    starts = scheduler.take_started()
    running = list(starts)
    choices = itertools.cycle(finish_first)
    while running:
        scheduler.finish(running.pop(0 if next(choices) else -1))
        now = scheduler.take_started()
        running += now
        starts += now
        scheduler.check_integrity()
    assert set(starts) == set(jobs), "somebody starved"
    for job in jobs:
        before = starts[: starts.index(job)]
        overtaking = sum(num_pages[j] for j in before if jobs.index(j) > jobs.index(job))
        assert overtaking <= num_pages[job]


def test_a_million_tokens_are_shared_with_short_prompts() -> None:
    scheduler = make_scheduler(num_pages=300_000, chunk_tokens=512)
    long = scheduler.submit(make_request(1_000_000))
    num_passes = num_shorts = 0
    while long.num_left:
        long.num_sent = long.num_computed
        if num_passes % 100 == 50:
            num_shorts += 1
            short = scheduler.submit(make_request(200))
            run_pass(scheduler)
            assert short.num_left == 0
            scheduler.finish(short)
        else:
            run_pass(scheduler)
        num_passes += 1
    assert num_passes <= -(-(1_000_000 + 200 * num_shorts) // 512) + 1
    scheduler.finish(long)
    scheduler.check_integrity()


def test_a_prompts_blocks_are_found_by_the_next() -> None:
    scheduler = make_scheduler(num_pages=8)
    first = scheduler.submit(make_request(14, token_id=7))
    run_pass(scheduler)
    second = scheduler.submit(make_request(22, token_id=7))
    assert (second.num_cached, second.num_computed) == (12, 12)
    assert second.pages[:3] == first.pages[:3], "shared while both want them"
    assert scheduler.num_queued_tokens == 2 + 10
    scheduler.finish(first)
    scheduler.finish(second)
    scheduler.check_integrity()
    again = scheduler.submit(make_request(8, token_id=7))
    assert (again.num_cached, again.num_left) == (8, 0)
    assert not scheduler.has_work
    assert scheduler.num_cached_tokens == 12 + 8


def test_nothing_is_found_under_another_salt_or_behind_another_token() -> None:
    scheduler = make_scheduler(num_pages=32)
    scheduler.submit(make_request(12, token_id=7, salt="a"))
    run_pass(scheduler)
    for other in (make_request(12, 7), make_request(12, 7, salt="b"), make_request(12, 8)):
        assert scheduler.submit(other).num_cached == 0
    assert scheduler.submit(make_request(12, 7, salt="a")).num_cached == 12


def test_what_a_pass_did_not_compute_is_not_found() -> None:
    scheduler = make_scheduler(num_pages=32)
    job = scheduler.submit(make_request(12, token_id=7))
    scheduler.next_chunks(0.0, 0.0)
    scheduler.finish(job)
    scheduler.complete_pass(is_computed=False)
    assert scheduler.submit(make_request(12, token_id=7)).num_cached == 0


def test_cached_pages_are_given_up_for_prompts_that_need_them() -> None:
    scheduler = make_scheduler(num_pages=4)
    first = scheduler.submit(make_request(12, token_id=7))
    run_pass(scheduler)
    scheduler.finish(first)
    other = scheduler.submit(make_request(16, token_id=8))
    assert len(other.pages) == 4
    scheduler.finish(other)
    assert scheduler.submit(make_request(12, token_id=7)).num_cached == 0


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
    assert job.pages == ()


def test_pages_of_a_job_in_a_pass_are_kept_until_it_ends() -> None:
    scheduler = make_scheduler(num_pages=2)
    job = scheduler.submit(make_request(8))
    scheduler.next_chunks(0.0, 0.0)
    scheduler.finish(job)
    waiting = scheduler.submit(make_request(4))
    assert waiting.pages == (), "a page that is being written was given to another"
    scheduler.complete_pass()
    assert len(waiting.pages) == 1
    scheduler.check_integrity()


def test_finishing_twice_frees_once() -> None:
    scheduler = make_scheduler()
    job = scheduler.submit(make_request(8))
    scheduler.finish(job)
    scheduler.finish(job)
    scheduler.check_integrity()


def written(job: PrefillJob) -> tuple[int, ...]:
    """The pages that the job has still to write to."""
    return job.pages[job.num_computed // PAGE_SIZE :]


class SchedulerMachine(RuleBasedStateMachine):
    """Jobs come, are computed, and are finished at any time, a pass under way or not."""

    @initialize(num_pages=st.integers(1, 12), chunk_tokens=st.integers(1, 20))
    def start(self, num_pages: int, chunk_tokens: int) -> None:
        self.num_pages, self.chunk_tokens = num_pages, chunk_tokens
        self.scheduler = make_scheduler(num_pages, chunk_tokens)
        self.jobs: list[PrefillJob] = []
        self.in_pass: Sequence[ScheduledChunk] | None = None
        self.pages_in_pass: set[int] = set()

    @rule(num_tokens=st.integers(1, 60), token_id=st.integers(0, 2))
    def submit(self, num_tokens: int, token_id: int) -> None:
        try:
            self.jobs.append(self.scheduler.submit(make_request(num_tokens, token_id)))
        except InvalidArgument:
            assert num_tokens > self.num_pages * PAGE_SIZE
        except ResourceExhausted:
            assert self.scheduler.num_waiting == 4

    @precondition(lambda self: self.in_pass is None)
    @rule()
    def begin_pass(self) -> None:
        self.in_pass = self.scheduler.next_chunks(0.0, 0.0)
        assert sum(chunk.num_tokens for chunk in self.in_pass) <= self.chunk_tokens
        assert all(0 < chunk.num_tokens <= chunk.job.num_left for chunk in self.in_pass)
        wanting = [job for job in self.jobs if job.pages and job.num_left]
        assert bool(self.in_pass) == bool(wanting), "work was left lying"
        self.pages_in_pass = {page for chunk in self.in_pass for page in written(chunk.job)}

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
        owned = [page for job in self.jobs for page in written(job)]
        assert len(owned) == len(set(owned)), "two jobs write the same page"
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
