"""Which prompts get pages and which chunks are computed next: pure, no torch, no clock.

Compute. Every prompt has an equal share of each pass, so a short one never waits for a long one.
While some would miss their deadlines that way, and need not, half of each pass goes to these,
the earliest deadline first.

Pages. A prompt has those of its whole length before its first chunk. They are given in order of
arrival, but a prompt that fits may overtake those that do not: each is overtaken by at most its
own number of pages in all, then everybody behind it waits. So none starves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from colm_serve.core import PrefillRequest
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.prefill_worker.job import PrefillJob
from colm_serve.prefill_worker.pages import JobPages

#: So many passes' worth of tokens may wait for a job's receiver; beyond it others come first.
MAX_UNSENT_PASSES = 4


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The next `num_tokens` tokens of a job, from its `num_computed` on."""

    job: PrefillJob
    num_tokens: int


class PrefillScheduler:
    """Admits jobs into a bounded queue, gives them pages, cuts their prompts into chunks.

    A job's pages hold its keys and values from its first chunk until its receiver has them all,
    so a slow receiver costs pages, never compute time.
    """

    def __init__(self, pages: JobPages, *, chunk_tokens: int, max_queued: int) -> None:
        self._pages = pages
        self._chunk_tokens = chunk_tokens
        self._max_queued = max_queued
        self._waiting: OrderedDict[PrefillJob, None] = OrderedDict()
        self._running: OrderedDict[PrefillJob, None] = OrderedDict()
        self._started: list[PrefillJob] = []
        self._in_pass: tuple[ScheduledChunk, ...] = ()
        self.num_cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """There is a chunk to compute."""
        return any(job.num_left and not job.is_cancelled for job in self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens still to be computed, of all jobs."""
        return sum(job.num_left for jobs in (self._waiting, self._running) for job in jobs)

    @property
    def queued(self) -> Iterator[tuple[int, int]]:
        """Of each job, the tokens [start, stop) still to be computed."""
        jobs = (job for jobs in (self._waiting, self._running) for job in jobs)
        return ((job.num_computed, job.num_tokens) for job in jobs)

    def num_tokens_before(self, job: PrefillJob) -> int:
        """Tokens of other prompts that are computed before all of this one's are."""
        others = (j for jobs in (self._waiting, self._running) for j in jobs if j is not job)
        if job in self._waiting:
            return sum(other.num_left for other in others)
        return sum(min(other.num_left, job.num_left) for other in others)

    def submit(self, request: PrefillRequest, deadline: float | None = None) -> PrefillJob:
        """Queue a job whose keys and values are wanted by `deadline`.

        Raises:
            InvalidArgument: the prompt would not fit even into an empty pool.
            ResourceExhausted: the queue is full.
        """
        if self._pages.pages_for(len(request.tokens)) > self._pages.num_pages:
            limit = self._pages.num_pages * self._pages.page_size
            raise InvalidArgument("token_ids", f"{len(request.tokens)} tokens", f"up to {limit}")
        if len(self._waiting) >= self._max_queued:
            raise ResourceExhausted(f"{self._max_queued} prompts are already waiting")
        job = PrefillJob(request, deadline)
        self._waiting[job] = None
        self._start_waiting()
        return job

    def take_started(self) -> list[PrefillJob]:
        """The jobs that have got pages since the last call, cached tokens included."""
        started, self._started = self._started, []
        return started

    def next_chunks(self, now: float, tokens_per_s: float) -> tuple[ScheduledChunk, ...]:
        """The chunks of the next forward pass.

        Jobs whose receivers lag have what the others leave.

        Args:
            now: on the clock of the deadlines.
            tokens_per_s: what the worker computes; 0 if unknown, then nobody is preferred.
        """
        assert not self._in_pass, "the last pass has not been completed"
        wanting = [job for job in self._running if job.num_left and not job.is_cancelled]
        if not wanting:
            return ()
        most = MAX_UNSENT_PASSES * self._chunk_tokens
        jobs = [job for job in wanting if job.num_unsent < most]
        urgent = _at_risk(jobs, now, tokens_per_s)
        num_tokens = dict.fromkeys(wanting, 0)
        budget = self._chunk_tokens
        if urgent:
            budget -= self._share(jobs, num_tokens, -(-budget // 2))
            for job in urgent:
                extra = min(budget, job.num_left - num_tokens[job])
                num_tokens[job] += extra
                budget -= extra
        budget -= self._share(jobs, num_tokens, budget)
        self._share(wanting, num_tokens, budget)
        self._in_pass = tuple(ScheduledChunk(job, num) for job, num in num_tokens.items() if num)
        return self._in_pass

    def complete_pass(
        self, *, is_computed: bool = True, failed: Collection[PrefillJob] = ()
    ) -> None:
        """The chunks last given out have been computed, or given up since nobody wants them.

        Of `failed` jobs nothing more is computed; they keep their pages until `finish`.
        """
        chunks, self._in_pass = self._in_pass, ()
        for chunk in chunks:
            if chunk.job in failed and not chunk.job.is_cancelled:
                chunk.job.is_cancelled = True
                continue
            if is_computed and chunk.job not in failed:
                chunk.job.num_computed += chunk.num_tokens
                self._pages.publish(chunk.job, chunk.num_tokens)
            if chunk.job.is_cancelled:
                self._drop(chunk.job)
        self._start_waiting()

    def finish(self, job: PrefillJob) -> None:
        """The job's receiver has everything, or is gone: free its pages, at the pass's end."""
        job.is_cancelled = True
        if not any(chunk.job is job for chunk in self._in_pass):
            self._drop(job)
            self._start_waiting()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the pages are sound, and free when there are no jobs."""
        self._pages.check_integrity(self._running)

    def _share(self, jobs: list[PrefillJob], num_tokens: dict[PrefillJob, int], budget: int) -> int:
        """Add equal shares of a budget to the jobs' tokens; returns what was given out.

        What a job does not need goes to the others. More jobs than tokens take turns.
        """
        if not budget:
            return 0
        lacking = [job for job in jobs if num_tokens[job] < job.num_left]
        served = lacking[:budget]
        if len(lacking) > budget:
            for job in served:
                self._running.move_to_end(job)
        left = budget
        for num_done, job in enumerate(sorted(served, key=lambda j: j.num_left - num_tokens[j])):
            share = min(job.num_left - num_tokens[job], left // (len(served) - num_done))
            num_tokens[job] += share
            left -= share
        return budget - left

    def _drop(self, job: PrefillJob) -> None:
        self._waiting.pop(job, None)
        if job in self._running:
            del self._running[job]
            self._pages.release(job)
        if job in self._started:
            self._started.remove(job)

    def _start_waiting(self) -> None:
        """Give pages to the waiting jobs that there are pages for and that may have them now."""
        if not self._waiting:
            return
        passed_over: list[PrefillJob] = []
        for job in list(self._waiting):
            num_pages = self._pages.pages_for(job.num_tokens)
            is_due = all(self._may_be_overtaken(other, num_pages) for other in passed_over)
            if is_due and self._start(job):
                for other in passed_over:
                    other.num_overtaking_pages += num_pages
            else:
                passed_over.append(job)

    def _may_be_overtaken(self, job: PrefillJob, num_pages: int) -> bool:
        return job.num_overtaking_pages + num_pages <= self._pages.pages_for(job.num_tokens)

    def _start(self, job: PrefillJob) -> bool:
        """Give a job its pages; False if they are not free."""
        if not self._pages.take(job):
            return False
        job.num_computed = job.num_cached
        self.num_cached_tokens += job.num_cached
        del self._waiting[job]
        self._running[job] = None
        self._started.append(job)
        return True


def _at_risk(jobs: list[PrefillJob], now: float, tokens_per_s: float) -> list[PrefillJob]:
    """Jobs that equal shares would make late though alone they would not be, earliest first."""
    due: list[tuple[float, int, PrefillJob]] = []
    for index, job in enumerate(jobs):
        if job.deadline is not None and tokens_per_s:
            alone_s = job.num_left / tokens_per_s
            if alone_s <= job.deadline - now < alone_s * len(jobs):
                due.append((job.deadline, index, job))
    return [job for _, _, job in sorted(due)]
