"""The prefill worker's loop: one compute thread over the scheduler's chunks.

The thread writes keys and values into the job's pages and says so, layer by layer; reading,
packing and sending them is the service's business, on other threads, while the next layer runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from colm_serve.config import PrefillConfig
from colm_serve.core import KvLayout, PrefillRequest, PrefillStatus
from colm_serve.engine.compute_thread import ComputeThread
from colm_serve.engine.loading import kv_layout, make_pool
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.prefill_cost import measure_prefill_cost
from colm_serve.engine.self_test import SelfTest
from colm_serve.engine.sparse.sparsity import make_sparsity
from colm_serve.errors import (
    ColmError,
    Incompatible,
    InvalidArgument,
    RowFailed,
    Unavailable,
    WorkerFailed,
)
from colm_serve.kv.ledger import PageLedger
from colm_serve.kv.pool import BlockTable
from colm_serve.latency.prefill_fit import PrefillFit
from colm_serve.latency.rate import COMPUTE_MEMORY_TOKENS, Rate
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.serving import ServingModel
from colm_serve.prefill_worker.job import PrefillJob
from colm_serve.prefill_worker.pages import LedgerPages
from colm_serve.prefill_worker.scheduler import PrefillScheduler, ScheduledChunk
from colm_serve.transport.codecs import get_codec
from colm_serve.transport.kv_frames import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accepted:
    """The job is queued behind `num_queued_tokens` of others; the worker makes `tokens_per_s`.

    `num_cached_tokens` of it need not be computed.
    """

    num_cached_tokens: int
    num_queued_tokens: int
    tokens_per_s: float


@dataclass(frozen=True)
class LayerDone:
    """K and V of tokens [start, stop) stand in the job's pages for one layer."""

    layer: int
    start: int
    stop: int


class TurnDone:
    """A forward pass has been computed that made nothing to send for this job."""


@dataclass(frozen=True)
class PromptDone:
    """Every layer of every token is there, `compute_s` after the first pass was begun."""

    compute_s: float


JobNews = Accepted | LayerDone | TurnDone | PromptDone | ColmError
#: Called with what became of a job, mostly on the compute thread; must not block.
JobSink = Callable[[JobNews], object]


@dataclass
class _Watch:
    """Who hears of a job, and when its first pass began."""

    sink: JobSink
    begin: float | None = None

    def compute_s(self, now: float) -> float:
        """0 if everything was cached."""
        return 0.0 if self.begin is None else now - self.begin


class _Abandoned(Exception):
    """Nobody waits for the pass any more."""


class PrefillWorker:
    """Chain 1, its KV pool and the thread that computes; thread-safe."""

    def __init__(
        self, loaded: LoadedModel[ServingModel], config: PrefillConfig, worker_id: str, epoch: int
    ) -> None:
        self.layout: KvLayout = kv_layout(loaded)
        self.pool = make_pool(loaded, config.num_pages, config.page_size)
        self._model = loaded.model
        self.kv_identity = loaded.kv_identity
        self.epoch = epoch
        self._sparsity = make_sparsity(config.sparse, loaded.model.config)
        self._worker_id = worker_id
        self._ledger = PageLedger(config.num_pages)
        self._pages = LedgerPages(self._ledger, config.page_size, loaded.kv_identity.encode())
        self._scheduler = PrefillScheduler(
            self._pages,
            chunk_tokens=config.chunk_tokens,
            max_queued=config.max_queued,
        )
        self._watches: dict[PrefillJob, _Watch] = {}
        self._tables: dict[PrefillJob, BlockTable] = {}
        self._self_test = SelfTest(loaded, config.page_size, with_head=False)
        self._rate = Rate(COMPUTE_MEMORY_TOKENS)
        self._fit = PrefillFit(measure_prefill_cost(loaded.model, self.pool, config.chunk_tokens))
        self._num_computed_tokens = 0
        self._compute = ComputeThread(
            worker_id,
            has_work=lambda: self._scheduler.has_work,
            take_turn=self._take_turn,
            on_failure=self._fail_all,
        )

    def start(self) -> None:
        self._compute.start()

    def stop(self) -> None:
        """End the compute thread after the layer it is in."""
        self._compute.stop()

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens computed since the start, for metrics and tests."""
        return self._num_computed_tokens

    def submit(
        self, request: PrefillRequest, sink: JobSink, remaining_s: float | None = None
    ) -> PrefillJob:
        """Check and queue a request; `sink` hears of its progress until `finish`.

        It is wanted before its first token is due, and before the call ends in `remaining_s`.

        Raises:
            Incompatible: the caller has other weights or another KV layout.
            InvalidArgument: an empty prompt, a token id, range or codec that is not allowed.
            ResourceExhausted: the queue is full.
            Unavailable: the worker is stopping or broken.
        """
        self._check(request)
        with self._compute.lock:
            self._compute.check_accepting()
            limits = [s for s in (request.ttft_s, remaining_s) if s is not None]
            deadline = time.perf_counter() + min(limits) if limits else None
            job = self._scheduler.submit(request, deadline)
            self._watches[job] = _Watch(sink)
            num_before = self._scheduler.num_tokens_before(job)
            sink(Accepted(job.num_cached, num_before, self._rate.per_s or 0.0))
            self._announce_cached()
            self._compute.lock.notify()
            return job

    def finish(self, job: PrefillJob) -> None:
        """Forget a job, sent or cancelled; its pages are free within one pass."""
        with self._compute.lock:
            self._watches.pop(job, None)
            self._tables.pop(job, None)
            self._scheduler.finish(job)
            self._announce_cached()
            self._compute.lock.notify()

    def sent(self, job: PrefillJob, num_tokens: int) -> None:
        """The job's receiver has taken the frames of the first `num_tokens`."""
        with self._compute.lock:
            job.num_sent = num_tokens

    @property
    def turn_s(self) -> float:
        """For how long the present pass has been going on; 0 between two."""
        return self._compute.turn_s

    def progress(self, job: PrefillJob) -> Progress:
        """How far the worker has come with a job."""
        with self._compute.lock:
            num_before = self._scheduler.num_tokens_before(job)
            return Progress(job.num_computed, num_before, self._rate.per_s or 0.0)

    def check_alive(self) -> None:
        """Raise Unavailable when the compute thread has failed: the process has to be replaced."""
        self._compute.check_alive()

    def status(self) -> PrefillStatus:
        with self._compute.lock:
            cost = self._fit.cost
            return PrefillStatus(
                worker_id=self._worker_id,
                epoch=self.epoch,
                kv_identity=self.kv_identity,
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                num_queued_tokens=self._scheduler.num_queued_tokens,
                queued_s=sum(cost.seconds(*left) for left in self._scheduler.queued),
                cost=cost,
                num_free_pages=self._ledger.num_free,
                num_pages=self._ledger.num_pages,
                num_computed_tokens=self._num_computed_tokens,
                num_cached_tokens=self._scheduler.num_cached_tokens,
            )

    def check_integrity(self) -> None:
        """Raise AssertionError unless no page is lost or held twice."""
        with self._compute.lock:
            self._scheduler.check_integrity()

    def _check(self, request: PrefillRequest) -> None:
        if request.kv_identity != self.kv_identity:
            raise Incompatible(
                f"kv_identity: the caller has {request.kv_identity!r}, {self._worker_id} serves "
                f"{self.kv_identity!r}: their chain-1 weights differ"
            )
        if request.layout != self.layout:
            raise Incompatible(f"layout: the caller has {request.layout}, here is {self.layout}")
        get_codec(request.codec)
        config = self._model.config
        if not 0 < len(request.tokens) <= config.max_context:
            shown = f"{len(request.tokens)} tokens"
            raise InvalidArgument("token_ids", shown, f"1 to {config.max_context} tokens")
        if max(request.tokens) >= config.vocab_size:
            allowed = f"ids below {config.vocab_size}"
            raise InvalidArgument("token_ids", max(request.tokens), allowed)
        if request.ship_from >= len(request.tokens):
            raise InvalidArgument("ship_from", request.ship_from, f"below {len(request.tokens)}")

    def _take_turn(self) -> None:
        with self._compute.lock:
            chunks = self._scheduler.next_chunks(time.perf_counter(), self._rate.per_s or 0.0)
            passes = [self._chunk(chunk) for chunk in chunks]
            begin = time.perf_counter()
            for chunk in chunks:
                watch = self._watches.get(chunk.job)
                if watch is not None:
                    watch.begin = watch.begin or begin
        if not passes:
            return
        failed: set[PrefillJob] = set()

        def stored(layer: int) -> None:
            if layer == self.layout.num_layers - 1:
                failed.update(self._without_numbers(chunks, passes))
            self._announce(layer, [chunk for chunk in chunks if chunk.job not in failed])

        try:
            run_prefill(self._model, self.pool, passes, stored, self._sparsity)
        except _Abandoned:
            with self._compute.lock:
                self._scheduler.complete_pass(is_computed=False)
                self._announce_cached()
        else:
            self._measure(passes, time.perf_counter() - begin)
            if failed and not self._self_test.passes():
                raise WorkerFailed("the model's keys and values are not all numbers")
            self._complete(chunks, failed)

    def _without_numbers(
        self, chunks: Sequence[ScheduledChunk], passes: Sequence[PrefillChunk]
    ) -> Iterator[PrefillJob]:
        """The jobs of which not all that the pass made are numbers."""
        for chunk, part in zip(chunks, passes, strict=True):
            if not self.pool.are_numbers(part.table, part.start, part.stop):
                yield chunk.job

    def _chunk(self, chunk: ScheduledChunk) -> PrefillChunk:
        start = chunk.job.num_computed
        prompt = chunk.job.request.tokens
        tokens = prompt[start : start + chunk.num_tokens]
        return PrefillChunk(tokens, start, self._table(chunk.job), len(prompt))

    def _table(self, job: PrefillJob) -> BlockTable:
        """The job's block table, made once: that of a long prompt takes time."""
        if job not in self._tables:
            self._tables[job] = self.pool.table(job.pages)
        return self._tables[job]

    def _announce_cached(self) -> None:
        """Jobs that have just got pages: what was cached of them can be sent before any compute."""
        for job in self._scheduler.take_started():
            watch = self._watches[job]
            if job.request.ship_from < job.num_cached:
                for layer in range(self.layout.num_layers):
                    watch.sink(LayerDone(layer, job.request.ship_from, job.num_cached))
            if job.num_left == 0:
                watch.sink(PromptDone(watch.compute_s(time.perf_counter())))

    def _announce(self, layer: int, chunks: Sequence[ScheduledChunk]) -> None:
        with self._compute.lock:
            is_wanted = not chunks or any(not chunk.job.is_cancelled for chunk in chunks)
            if self._compute.is_stopping or not is_wanted:
                raise _Abandoned
            for chunk in chunks:
                start, stop = chunk.job.num_computed, chunk.job.num_computed + chunk.num_tokens
                start = max(start, chunk.job.request.ship_from)
                watch = self._watches.get(chunk.job)
                if watch is not None and start < stop:
                    watch.sink(LayerDone(layer, start, stop))

    def _measure(self, passes: list[PrefillChunk], seconds: float) -> None:
        num_tokens = sum(len(chunk.tokens) for chunk in passes)
        self._num_computed_tokens += num_tokens
        with self._compute.lock:
            self._rate.add(num_tokens, seconds)
            self._fit.observe(((chunk.start, chunk.stop) for chunk in passes), seconds)

    def _complete(self, chunks: Sequence[ScheduledChunk], failed: Collection[PrefillJob]) -> None:
        with self._compute.lock:
            for job in failed:
                logger.warning("request %s: not all numbers", job.request.request_id)
                self._pages.withdraw(job)
            self._scheduler.complete_pass(failed=failed)
            computed = {chunk.job for chunk in chunks}
            for job, watch in self._watches.items():
                if job in failed:
                    watch.sink(RowFailed("the prompt's keys and values are not all numbers"))
                elif job.num_left == 0:
                    if job in computed:
                        watch.sink(PromptDone(watch.compute_s(time.perf_counter())))
                elif job not in computed or job.num_computed <= job.request.ship_from:
                    watch.sink(TurnDone())
            self._announce_cached()

    def _fail_all(self, error: Unavailable) -> None:
        for watch in self._watches.values():
            watch.sink(error)
