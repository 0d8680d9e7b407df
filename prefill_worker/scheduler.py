"""Which prompts' chunks are computed next: pure, no torch, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from colm_serve.core import PrefillRequest
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.kv.ledger import PageLedger


@dataclass
class PrefillJob:
    """One prompt on its way through chain 1."""

    request: PrefillRequest
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_cancelled: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.request.tokens)

    @property
    def num_left(self) -> int:
        return self.num_tokens - self.num_computed


@dataclass(frozen=True)
class ScheduledChunk:
    """The next `num_tokens` tokens of a job, from its `num_computed` on."""

    job: PrefillJob
    num_tokens: int


class PrefillScheduler:
    """Admits jobs into a bounded queue, gives them pages, cuts their prompts into chunks.

    A job's pages hold its keys and values from its first chunk until its receiver has them all,
    so a slow receiver costs pages, never compute time.
    """

    def __init__(
        self, ledger: PageLedger, *, page_size: int, chunk_tokens: int, max_queued: int
    ) -> None:
        self._ledger = ledger
        self._page_size = page_size
        self._chunk_tokens = chunk_tokens
        self._max_queued = max_queued
        self._waiting: OrderedDict[int, PrefillJob] = OrderedDict()
        self._running: OrderedDict[int, PrefillJob] = OrderedDict()
        self._in_pass: tuple[ScheduledChunk, ...] = ()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """There is a chunk to compute."""
        return any(job.num_left and not job.is_cancelled for job in self._running.values())

    @property
    def num_queued_tokens(self) -> int:
        """Tokens still to be computed, of all jobs."""
        return sum(j.num_left for jobs in (self._waiting, self._running) for j in jobs.values())

    def submit(self, request: PrefillRequest) -> PrefillJob:
        """Queue a job.

        Raises:
            InvalidArgument: the prompt would not fit even into an empty pool.
            ResourceExhausted: the queue is full.
        """
        num_pages = self._num_pages(len(request.tokens))
        if num_pages > self._ledger.num_pages:
            limit = self._ledger.num_pages * self._page_size
            raise InvalidArgument("token_ids", f"{len(request.tokens)} tokens", f"up to {limit}")
        if len(self._waiting) >= self._max_queued:
            raise ResourceExhausted(f"{self._max_queued} prompts are already waiting")
        job = PrefillJob(request)
        self._waiting[id(job)] = job
        self._start_waiting()
        return job

    def next_chunks(self) -> tuple[ScheduledChunk, ...]:
        """The chunks of the next forward pass: an equal share of the budget for each job.

        Equal shares keep a short prompt from waiting for a long one; what a job does not need
        goes to the others, earliest first.
        """
        assert not self._in_pass, "the last pass has not been completed"
        jobs = [job for job in self._running.values() if job.num_left and not job.is_cancelled]
        budget = self._chunk_tokens
        chunks = []
        for num_done, job in enumerate(sorted(jobs, key=lambda job: job.num_left)):
            share = max(1, budget // (len(jobs) - num_done))
            num_tokens = min(job.num_left, share, budget)
            if num_tokens == 0:
                break
            chunks.append(ScheduledChunk(job, num_tokens))
            budget -= num_tokens
        self._in_pass = tuple(chunks)
        return self._in_pass

    def complete_pass(self) -> None:
        """The chunks last given out have been computed (or abandoned, if all were cancelled)."""
        chunks, self._in_pass = self._in_pass, ()
        for chunk in chunks:
            chunk.job.num_computed += chunk.num_tokens
            if chunk.job.is_cancelled:
                self._drop(chunk.job)

    def finish(self, job: PrefillJob) -> None:
        """The job's receiver has everything, or is gone: free its pages, at the pass's end."""
        job.is_cancelled = True
        if not any(chunk.job is job for chunk in self._in_pass):
            self._drop(job)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the ledger is sound and idle when there are no jobs."""
        self._ledger.check_integrity()
        held = sum(len(job.pages) for job in self._running.values())
        assert held + self._ledger.num_free == self._ledger.num_pages, "pages were lost"

    def _drop(self, job: PrefillJob) -> None:
        self._waiting.pop(id(job), None)
        if self._running.pop(id(job), None) is not None:
            self._ledger.release(job.pages)
            job.pages = []
            self._start_waiting()

    def _start_waiting(self) -> None:
        """Give pages to waiting jobs, in order: a long prompt is not starved by short ones."""
        while self._waiting:
            key, job = next(iter(self._waiting.items()))
            num_pages = self._num_pages(job.num_tokens)
            if num_pages > self._ledger.num_free:
                return
            job.pages = self._ledger.allocate(num_pages)
            self._running[key] = self._waiting.pop(key)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)
