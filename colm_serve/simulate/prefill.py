"""A prefill worker on the virtual clock: the real scheduler, passes that take what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from colm_serve.config import PrefillConfig
from colm_serve.core import Member, PrefillCost, PrefillRequest, PrefillStatus
from colm_serve.decode_worker.prefill_plan import PrefillOffer
from colm_serve.latency.rate import COMPUTE_MEMORY_TOKENS, Rate
from colm_serve.prefill_worker.job import PrefillJob
from colm_serve.prefill_worker.scheduler import PrefillScheduler, ScheduledChunk
from colm_serve.simulate.clock import VirtualClock
from colm_serve.simulate.costs import WorkerCosts
from colm_serve.simulate.page_counts import Holding, PageCounts
from colm_serve.simulate.trace import Block


@dataclass(frozen=True)
class TracedPrefill(PrefillRequest):
    """A request whose prompt is known by its blocks."""

    blocks: tuple[Block, ...] = ()


class CountedPages:
    """`prefill_worker.pages.JobPages` by the count."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._counts = PageCounts(num_pages, page_size)
        self._holdings: dict[PrefillJob, Holding] = {}

    @property
    def num_free(self) -> int:
        return self._counts.num_free

    def pages_for(self, num_tokens: int) -> int:
        return self._counts.pages_for(num_tokens)

    def take(self, job: PrefillJob) -> bool:
        num_pages = self.pages_for(job.num_tokens)
        taken = self._counts.take(_blocks(job), job.num_tokens, num_pages)
        if taken is None:
            return False
        self._holdings[job], job.num_cached = taken
        return True

    def publish(self, job: PrefillJob, num_new: int) -> None:
        self._counts.publish(self._holdings[job], _blocks(job), job.num_computed)

    def release(self, job: PrefillJob) -> None:
        self._counts.release(self._holdings.pop(job))

    def check_integrity(self, jobs: Iterable[PrefillJob]) -> None:
        self._counts.check_integrity()
        assert set(jobs) == set(self._holdings), "pages are held for no job"
        assert self._holdings or self.num_free == self.num_pages, "pages were lost"


def _blocks(job: PrefillJob) -> tuple[Block, ...]:
    assert isinstance(job.request, TracedPrefill)
    return job.request.blocks


@dataclass(slots=True)
class _Delivery:
    """What a receiver waits for: the first `stop` tokens of its prompt."""

    stop: int
    begin: float
    on_arrival: Callable[[], object]


@dataclass(eq=False)
class VirtualPrefillWorker:
    """Answers as `prefill_worker.worker` does, without computing anything."""

    member: Member
    config: PrefillConfig
    costs: WorkerCosts
    clock: VirtualClock
    _deliveries: dict[PrefillJob, _Delivery] = field(default_factory=dict)
    _is_busy: bool = False
    _num_computed_tokens: int = 0

    def __post_init__(self) -> None:
        self._cost = self.costs.prefill.cost(self.config.chunk_tokens)
        self._rate = Rate(COMPUTE_MEMORY_TOKENS)
        self._pages = CountedPages(self.config.num_pages, self.config.page_size)
        self._scheduler = PrefillScheduler(
            self._pages,
            chunk_tokens=self.config.chunk_tokens,
            max_queued=self.config.max_queued,
        )

    def submit(self, request: TracedPrefill) -> tuple[PrefillJob, PrefillOffer]:
        """Queue a prompt; `deliver` says what is wanted of it.

        Raises:
            InvalidArgument: it would not fit even into an empty pool.
            ResourceExhausted: the queue is full.
        """
        deadline = None if request.ttft_s is None else self.clock.now + request.ttft_s
        job = self._scheduler.submit(request, deadline)
        offer = PrefillOffer(
            num_cached_tokens=job.num_cached,
            num_queued_tokens=self._scheduler.num_tokens_before(job),
            tokens_per_s=self._rate.per_s or 0.0,
            link_tokens_per_s=self.costs.link_tokens_per_s,
        )
        return job, offer

    def deliver(self, job: PrefillJob, stop: int, on_arrival: Callable[[], object]) -> None:
        """Send the keys and values before `stop` and forget the job; then call `on_arrival`."""
        self._deliveries[job] = _Delivery(stop, self.clock.now, on_arrival)
        self._send_complete(job)
        self._wake()

    def cancel(self, job: PrefillJob) -> None:
        """Nobody waits for it any more."""
        self._deliveries.pop(job, None)
        self._scheduler.finish(job)
        self._wake()

    def status(self) -> PrefillStatus:
        return PrefillStatus(
            worker_id=self.member.worker_id,
            epoch=self.member.epoch,
            kv_identity=self.member.kv_identity,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_queued_tokens=self._scheduler.num_queued_tokens,
            queued_s=sum(self._cost.seconds(*left) for left in self._scheduler.queued),
            cost=self._cost,
            num_free_pages=self._pages.num_free,
            num_pages=self._pages.num_pages,
            num_computed_tokens=self._num_computed_tokens,
            num_cached_tokens=self._scheduler.num_cached_tokens,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless no page is lost or held twice."""
        self._scheduler.check_integrity()

    def _wake(self) -> None:
        for job in self._scheduler.take_started():
            self._send_complete(job)
        if not self._is_busy:
            self._take_turn()

    def _take_turn(self) -> None:
        chunks = self._scheduler.next_chunks(self.clock.now, self._rate.per_s or 0.0)
        self._is_busy = bool(chunks)
        if chunks:
            num_tokens = sum([chunk.num_tokens for chunk in chunks])
            seconds = self.costs.prefill.seconds(num_tokens, sum(map(_num_attended, chunks)))
            self.clock.at(self.clock.now + seconds, self._complete, chunks, num_tokens, seconds)

    def _complete(
        self, chunks: tuple[ScheduledChunk, ...], num_tokens: int, seconds: float
    ) -> None:
        self._rate.add(num_tokens, seconds)
        self._num_computed_tokens += num_tokens
        self._scheduler.complete_pass()
        for chunk in chunks:
            chunk.job.num_sent = chunk.job.num_computed
            self._send_complete(chunk.job)
        self._is_busy = False
        self._wake()

    def _send_complete(self, job: PrefillJob) -> None:
        delivery = self._deliveries.get(job)
        if delivery is not None and job.num_computed >= delivery.stop:
            self._send(job)

    def _send(self, job: PrefillJob) -> None:
        """All that is wanted has been computed: it arrives once the link has carried it."""
        delivery = self._deliveries.pop(job)
        num_shipped = delivery.stop - job.request.ship_from
        link_end = delivery.begin + num_shipped * self.costs.transfer_token_s
        arrival = max(self.clock.now, link_end) + self.costs.hop_s
        self.clock.at(arrival, self._arrive, job, delivery.on_arrival)

    def _arrive(self, job: PrefillJob, on_arrival: Callable[[], object]) -> None:
        if not job.is_cancelled:
            self._scheduler.finish(job)
            self._wake()
            on_arrival()


def _num_attended(chunk: ScheduledChunk) -> int:
    start = chunk.job.num_computed
    return PrefillCost.num_attended_keys(start, start + chunk.num_tokens)
