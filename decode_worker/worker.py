"""The decode worker's loop: one compute thread that steps a continuous batch of mixed levels.

Between two steps it computes at most one pass of local prefill chunks, so a prompt that is
computed here slows the running rows down but never stops them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from colm_serve.config import DecodeConfig
from colm_serve.core import (
    DecodedToken,
    DecodeRequest,
    DecodeStatus,
    FinishReason,
    KvLayout,
)
from colm_serve.decode_worker.scheduler import DecodeScheduler, LocalChunk, Sequence
from colm_serve.engine.compute_thread import ComputeThread
from colm_serve.engine.grammar_compiler import CompiledGrammar, GrammarCompiler
from colm_serve.engine.loading import kv_layout, make_pool
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.sampler import Run, sample
from colm_serve.engine.step import Segment, measure_step_cost, run_pass
from colm_serve.errors import ColmError, Incompatible, InvalidArgument, Unavailable
from colm_serve.kv.ledger import PageLedger
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.serving import ServingModel


class PromptComputed:
    """The prompt's KV, computed on this worker, is complete."""


#: Called on the compute thread with what became of a sequence; must not block.
SequenceSink = Callable[[PromptComputed | DecodedToken | FinishReason | ColmError], object]


class DecodeWorker:
    """Every chain, the KV pool and the thread that computes; thread-safe."""

    def __init__(
        self, loaded: LoadedModel[ServingModel], config: DecodeConfig, worker_id: str, epoch: int
    ) -> None:
        self.layout: KvLayout = kv_layout(loaded)
        self.pool = make_pool(loaded, config.num_pages, config.page_size)
        self.kv_identity = loaded.kv_identity
        self.grammars = GrammarCompiler(loaded.folder, loaded.model.config)
        self.num_steps = 0
        self._model = loaded.model
        self._config = config
        self._worker_id = worker_id
        self._epoch = epoch
        self._step_cost = measure_step_cost(loaded.model, self.pool)
        self._prefill_tokens_per_s = 0.0
        self._ledger = PageLedger(config.num_pages)
        self._scheduler = DecodeScheduler(
            self._ledger,
            page_size=config.page_size,
            max_rows=config.max_rows,
            max_waiting=config.max_waiting,
            chunk_tokens=config.chunk_tokens,
            eos_token_ids=loaded.model.config.eos_token_ids,
            cache_root=loaded.kv_identity.encode(),
        )
        self._sinks: dict[int, SequenceSink] = {}
        self._processors: dict[int, LogitsProcessor] = {}
        self._compute = ComputeThread(
            worker_id,
            has_work=lambda: self._scheduler.has_work,
            take_turn=self._take_turn,
            on_failure=self._fail_all,
        )

    def start(self) -> None:
        self._compute.start()

    def stop(self) -> None:
        """End the compute thread after the turn it is in."""
        self._compute.stop()

    def admit(
        self,
        request: DecodeRequest,
        sink: SequenceSink,
        grammar: CompiledGrammar | None = None,
    ) -> Sequence:
        """Check a request and reserve its pages; `sink` hears of it until `release`.

        Args:
            grammar: that of the request, compiled by `grammars`, which takes too long for here.

        Raises:
            Incompatible: the router means other weights.
            InvalidArgument: an empty prompt, a token id or level that is not allowed, more
                tokens than the context holds, or more resumed ones than the prompt.
            ResourceExhausted: there is no room now.
            Unavailable: the worker is stopping or broken.
        """
        self._check(request)
        with self._compute.lock:
            self._compute.check_accepting()
            sequence = self._scheduler.admit(request)
            self._sinks[id(sequence)] = sink
            eos_token_ids = self._model.config.eos_token_ids
            processor = LogitsProcessor.make(request, sequence.tokens, eos_token_ids, grammar)
            if processor is not None:
                self._processors[id(sequence)] = processor
            return sequence

    def compute_prompt(self, sequence: Sequence) -> None:
        """Compute the rest of the prompt's KV here; the sink hears PromptComputed."""
        with self._compute.lock:
            self._scheduler.compute_here(sequence)
            self._compute.lock.notify()

    def begin(self, sequence: Sequence) -> None:
        """The prompt's KV is complete: make tokens until the sequence ends."""
        with self._compute.lock:
            self._scheduler.start(sequence)
            self._compute.lock.notify()

    def move_level(self, sequence: Sequence, level: int) -> None:
        """Make the sequence's tokens at `level` from its next step on.

        Raises:
            InvalidArgument: no such level.
        """
        self._check_level(level)
        with self._compute.lock:
            sequence.level = level

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence, ended or not; its pages are free within one step."""
        with self._compute.lock:
            self._sinks.pop(id(sequence), None)
            self._processors.pop(id(sequence), None)
            self._scheduler.cancel(sequence)

    def check_alive(self) -> None:
        """Raise Unavailable when the compute thread has failed: the process has to be replaced."""
        self._compute.check_alive()

    def status(self) -> DecodeStatus:
        with self._compute.lock:
            return DecodeStatus(
                worker_id=self._worker_id,
                epoch=self._epoch,
                kv_identity=self.kv_identity,
                num_levels=self._model.num_chains,
                max_rows=self._config.max_rows,
                num_waiting=self._scheduler.num_waiting,
                num_running=self._scheduler.num_running(self._model.num_chains),
                num_free_pages=self._ledger.num_free,
                num_pages=self._ledger.num_pages,
                page_size=self._config.page_size,
                step_cost=self._step_cost,
                prefill_tokens_per_s=self._prefill_tokens_per_s,
            )

    def check_integrity(self) -> None:
        """Raise AssertionError unless no page is lost or held twice."""
        with self._compute.lock:
            self._scheduler.check_integrity()

    def _check(self, request: DecodeRequest) -> None:
        if request.kv_identity != self.kv_identity:
            raise Incompatible(
                f"kv_identity: the router means {request.kv_identity!r}, {self._worker_id} "
                f"serves {self.kv_identity!r}"
            )
        self._check_level(request.level)
        config = self._model.config
        if not request.prompt:
            raise InvalidArgument("prompt_token_ids", "no tokens", "at least 1 token")
        if max(request.prompt) >= config.vocab_size:
            allowed = f"ids below {config.vocab_size}"
            raise InvalidArgument("prompt_token_ids", max(request.prompt), allowed)
        if request.num_resumed_tokens >= len(request.prompt):
            allowed = f"fewer than the prompt's {len(request.prompt)} tokens"
            raise InvalidArgument("num_resumed_tokens", request.num_resumed_tokens, allowed)
        request.sampling.check_vocabulary(config.vocab_size, config.eos_token_ids)
        num_tokens = len(request.prompt) + request.sampling.max_tokens
        if num_tokens > config.max_context:
            shown = f"prompt + max_tokens = {num_tokens}"
            raise InvalidArgument("max_tokens", shown, f"together up to {config.max_context}")

    def _check_level(self, level: int) -> None:
        if not 1 <= level <= self._model.num_chains:
            raise InvalidArgument("level", level, f"1 to {self._model.num_chains}")

    def _take_turn(self) -> None:
        self._decode()
        self._prefill()

    def _decode(self) -> None:
        with self._compute.lock:
            sequences = self._scheduler.next_rows()
            rows = [
                Segment(
                    tokens=sequence.tokens[-1:],
                    start=len(sequence.tokens) - 1,
                    level=sequence.level,
                    table=self.pool.table(sequence.pages),
                )
                for sequence in sequences
            ]
            processors = [self._processors.get(id(sequence)) for sequence in sequences]
        if not rows:
            return
        scores = run_pass(self._model, self.pool, rows)
        runs = [
            Run(sequence.request.sampling, row.stop, processor)
            for sequence, row, processor in zip(sequences, rows, processors, strict=True)
        ]
        sampled = sample(scores.logits_SV, runs)
        with self._compute.lock:
            self.num_steps += 1
            row_of = {id(sequence): row for row, sequence in enumerate(sequences)}
            made = [row.tokens[0] for row in sampled]
            for sequence, reason in self._scheduler.complete_rows(tuple(made)):
                sink, row = self._sinks[id(sequence)], row_of[id(sequence)]
                if reason is not None and (failure := _failure(processors[row])) is not None:
                    sink(failure)
                    continue
                logprobs = sampled[row].logprobs
                sink(DecodedToken(made[row], rows[row].level, logprobs[0] if logprobs else None))
                if reason is not None:
                    sink(reason)

    def _prefill(self) -> None:
        with self._compute.lock:
            chunks = self._scheduler.next_chunks()
            passes = [self._chunk(chunk) for chunk in chunks]
        if not passes:
            return
        begin = time.perf_counter()
        run_prefill(self._model, self.pool, passes)
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        self._prefill_tokens_per_s = num_tokens / (time.perf_counter() - begin)
        with self._compute.lock:
            for sequence in self._scheduler.complete_chunks(chunks):
                self._sinks[id(sequence)](PromptComputed())

    def _chunk(self, chunk: LocalChunk) -> PrefillChunk:
        sequence = chunk.sequence
        start = sequence.num_computed
        tokens = sequence.request.prompt[start : start + chunk.num_tokens]
        return PrefillChunk(tokens, start, self.pool.table(sequence.pages))

    def _fail_all(self, error: Unavailable) -> None:
        for sink in self._sinks.values():
            sink(error)


def _failure(processor: LogitsProcessor | None) -> InvalidArgument | None:
    return None if processor is None else processor.failure()
