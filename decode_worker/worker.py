"""The decode worker's loop: one compute thread that steps a continuous batch of mixed levels.

A step takes chunks of the prompts that are computed here along, up to a budget of tokens: they
slow the running rows down but never stop them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial

from torch import Tensor

from colm_serve.config import DecodeConfig
from colm_serve.core import (
    DecodedToken,
    DecodeRequest,
    DecodeStatus,
    FinishReason,
    KvLayout,
    Logprobs,
    ScoredPrompt,
    TokenLogprob,
)
from colm_serve.decode_worker.grammar_steps import GRACE_S, GrammarSteps
from colm_serve.decode_worker.prefill_plan import LocalLoad
from colm_serve.decode_worker.scheduler import DecodeScheduler
from colm_serve.decode_worker.sequence import Sequence, Stage
from colm_serve.decode_worker.speculation import Speculation, Step
from colm_serve.decode_worker.step_meter import StepMeter
from colm_serve.decode_worker.turn import Chunk, Outcome, Row, Turn
from colm_serve.engine.compute_thread import ComputeThread
from colm_serve.engine.failed import Failed, attempt
from colm_serve.engine.grammar_compiler import CompiledGrammar, GrammarCompiler
from colm_serve.engine.loading import kv_layout, make_pool
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.sampler import Run, Sampled, best_tokens, logprobs_of, no_numbers
from colm_serve.engine.self_test import SelfTest
from colm_serve.engine.step import Segment, run_pass
from colm_serve.engine.step_cost import measure_step_cost
from colm_serve.errors import (
    ColmError,
    Incompatible,
    InvalidArgument,
    Unavailable,
    UnknownRequest,
    WorkerFailed,
)
from colm_serve.kv.ledger import PageLedger
from colm_serve.kv.pool import BlockTable
from colm_serve.latency.rate import COMPUTE_MEMORY_TOKENS, Rate
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.serving import ServingModel

logger = logging.getLogger(__name__)


class PromptComplete:
    """All of the prompt's KV is there."""


class Readmitted:
    """The sequence was preempted and has pages again, which lack KV: `begin` it once more."""


SequenceNews = PromptComplete | Readmitted | ScoredPrompt | DecodedToken | FinishReason | ColmError
#: Called with what became of a sequence, mostly on the compute thread; must not block.
SequenceSink = Callable[[SequenceNews], object]
#: What a turn made of its slices, but for prompts of which only K and V are wanted.
_Made = dict[Row | Chunk, Sampled | ScoredPrompt | Failed]


class DecodeWorker:
    """Every chain, the KV pool and the thread that computes; thread-safe.

    `variant` names the upper chains as `core.Member` does; None: there are none, and level 1 is
    that of every variant.
    """

    def __init__(
        self,
        loaded: LoadedModel[ServingModel],
        config: DecodeConfig,
        worker_id: str,
        epoch: int,
        variant: str | None = "",
    ) -> None:
        self.layout: KvLayout = kv_layout(loaded)
        self.pool = make_pool(loaded, config.num_pages, config.page_size)
        self.kv_identity = loaded.kv_identity
        self.grammars = GrammarCompiler(loaded.folder, loaded.model.config)
        self.num_steps = 0
        self.num_failed_rows = 0
        self._model = loaded.model
        self._config = config
        self._worker_id = worker_id
        self._epoch = epoch
        self._variant = variant
        self._self_test = SelfTest(loaded, config.page_size)
        step_cost = measure_step_cost(loaded.model, self.pool)
        self._meter = StepMeter(step_cost)
        self._speculation = Speculation(loaded.model, self.pool, step_cost, config.speculation)
        self._prefill_rate = Rate(COMPUTE_MEMORY_TOKENS)
        self._ledger = PageLedger(config.num_pages)
        self._scheduler = DecodeScheduler(
            self._ledger,
            page_size=config.page_size,
            max_rows=config.max_rows,
            max_waiting=config.max_waiting,
            max_batch_tokens=config.max_batch_tokens,
            expected_output_tokens=config.expected_output_tokens,
            eos_token_ids=loaded.model.config.eos_token_ids,
            cache_root=loaded.kv_identity.encode(),
        )
        self._sinks: dict[Sequence, SequenceSink] = {}
        self._processors: dict[Sequence, LogitsProcessor] = {}
        self._grammar_steps = GrammarSteps(self._go_on)
        self._tables: dict[Sequence, BlockTable] = {}
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
        self._grammar_steps.close()

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
            RowFailed: the request's rules cannot be followed.
            Unavailable: the worker is stopping or broken.
        """
        self._check(request)
        with self._compute.lock:
            self._compute.check_accepting()
            sequence = self._scheduler.admit(request)
            self._sinks[sequence] = sink
            eos_token_ids = self._model.config.eos_token_ids
            processor = attempt(
                partial(LogitsProcessor.make, request, sequence.tokens, eos_token_ids, grammar)
            )
            if isinstance(processor, Failed):
                self._note_failed(sequence, processor.error)
                self.release(sequence)
                raise processor.error
            if processor is not None:
                self._processors[sequence] = processor
                self._grammar_steps.begin(sequence, processor)
            if request.sampling.prompt_logprobs is not None:
                sink(ScoredPrompt((Logprobs(TokenLogprob(request.prompt[0], None)),)))
            return sequence

    def begin(self, sequence: Sequence) -> None:
        """Nobody else fills the sequence's pages: compute what they lack, then make tokens."""
        with self._compute.lock:
            self._scheduler.start(sequence)
            if sequence.stage is Stage.RUNNING:
                self._sinks[sequence](PromptComplete())
            self._compute.lock.notify()

    def check_level(self, level: int) -> None:
        """Raise InvalidArgument unless the model has the level."""
        if not 1 <= level <= self._model.num_chains:
            raise InvalidArgument("level", level, f"1 to {self._model.num_chains}")

    def move_level(self, sequence: Sequence, level: int) -> None:
        """Make the sequence's tokens at `level` from its next step on.

        Raises:
            InvalidArgument: no such level.
            UnknownRequest: it has ended.
        """
        self.check_level(level)
        with self._compute.lock:
            if sequence.stage is Stage.FINISHED:
                allowed = "the id of a request that goes on"
                raise UnknownRequest("request_id", sequence.request.request_id, allowed)
            sequence.level = level

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence, ended or not; its pages are free within one step."""
        with self._compute.lock:
            self._sinks.pop(sequence, None)
            self._processors.pop(sequence, None)
            self._tables.pop(sequence, None)
            self._speculation.forget(sequence)
            self._scheduler.cancel(sequence)
            self._compute.lock.notify()

    def local_load(self, sequence: Sequence) -> LocalLoad:
        """What computing the tokens that the sequence lacks would cost, if that may be chosen."""
        with self._compute.lock:
            num_rows = sum(self._scheduler.num_running(self._model.num_chains))
            is_known = self._config.adaptive_prefill
            return LocalLoad(
                tokens_per_s=self._prefill_rate.per_s if is_known else None,
                num_queued_tokens=self._scheduler.num_tokens_before(sequence),
                num_rows=num_rows,
            )

    @property
    def turn_s(self) -> float:
        """For how long the present pass has been going on; 0 between two."""
        return self._compute.turn_s

    def check_alive(self) -> None:
        """Raise Unavailable when the compute thread has failed: the process has to be replaced."""
        self._compute.check_alive()

    def status(self) -> DecodeStatus:
        step_cost = self._meter.cost()
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
                step_cost=step_cost,
                prefill_tokens_per_s=self._prefill_rate.per_s or 0.0,
                expected_output_tokens=self._config.expected_output_tokens,
                num_preemptions=self._scheduler.num_preemptions,
                num_failed_rows=self.num_failed_rows,
                num_drafted=self._speculation.num_drafted,
                num_accepted=self._speculation.num_accepted,
                num_attended=self._scheduler.num_attended(self._model.num_chains),
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
        if self._variant is not None and request.variant != self._variant:
            # The worker that the router means is gone, and this one has its address.
            raise Unavailable(
                f"{self._worker_id} decodes for variant {self._variant!r}, not {request.variant!r}"
            )
        self.check_level(request.level)
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

    def _take_turn(self) -> None:
        begin = time.perf_counter()
        with self._compute.lock:
            turn = self._scheduler.next_turn()
            for sequence in turn.preempted:
                logger.info(
                    "request %s: preempted with %d tokens for want of KV pages",
                    sequence.request.request_id, len(sequence.tokens),
                )  # fmt: skip
            for sequence in turn.readmitted:
                self._sinks[sequence](Readmitted())
            ready = {part: attempt(partial(self._prepare, part)) for part in turn.slices}
        if not turn.slices:
            return
        made: _Made = {part: it for part, it in ready.items() if isinstance(it, Failed)}
        steps = [it for it in ready.values() if isinstance(it, Step)]
        if any(step.row.num_drafts for step in steps):
            self._await_grammars(steps)
        steps = self._speculation.draft(steps)
        chunks = {
            part: it
            for part, it in ready.items()
            if isinstance(part, Chunk) and isinstance(it, Segment)
        }
        stored = {chunk: it for chunk, it in chunks.items() if not chunk.num_scored}
        made |= self._run_rows(steps, stored)
        made |= self._score_prompts({c: it for c, it in chunks.items() if c.num_scored})
        self._check_model(made)
        with self._compute.lock:
            self.num_steps += bool(steps)
            self._complete(turn, made)
            self._speculation.learn(steps, [made[step.row] for step in steps], list(stored))
        if steps and not chunks and not any(step.run.drafts for step in steps):
            rows = ((step.row.level, step.segment.stop) for step in steps)
            self._meter.note(rows, time.perf_counter() - begin)

    def _run_rows(self, steps: list[Step], chunks: Mapping[Chunk, Segment]) -> _Made:
        """One pass over the rows, with the prompts whose K and V it stores behind them."""
        if not (steps or chunks):
            return {}
        begin = time.perf_counter()
        segments = [*(step.segment for step in steps), *chunks.values()]
        scores = run_pass(self._model, self.pool, segments)
        self._await_grammars(steps)
        sampled = self._speculation.sample(steps, scores)
        made: _Made = dict(zip((step.row for step in steps), sampled, strict=True))
        for chunk, segment in chunks.items():
            if not self.pool.are_numbers(segment.table, segment.start, segment.stop):
                made[chunk] = no_numbers()
        if chunks:
            num_tokens = sum(chunk.num_tokens for chunk in chunks)
            self._prefill_rate.add(num_tokens, time.perf_counter() - begin)
        return made

    def _score_prompts(self, chunks: Mapping[Chunk, Segment]) -> _Made:
        """What the prompts' own levels say of their tokens, in a pass of its own."""
        if not chunks:
            return {}
        scores = run_pass(self._model, self.pool, list(chunks.values()))
        parts = scores.logits_SV.split([chunk.num_scored for chunk in chunks])
        return {
            chunk: attempt(partial(_score_prompt, chunk, segment, logits_TV))
            for (chunk, segment), logits_TV in zip(chunks.items(), parts, strict=True)
        }

    def _check_model(self, made: _Made) -> None:
        """Raise WorkerFailed when the model gives no numbers for its own test either.

        Then requests hear that the worker is gone, and go on at another one. Where it passes, only
        those fail whose scores these were: they would elsewhere too.
        """
        is_doubtful = any(isinstance(it, Failed) and it.is_of_model for it in made.values())
        if is_doubtful and not self._self_test.passes():
            raise WorkerFailed("the model's scores are not all numbers, whatever the text")

    def _prepare(self, part: Row | Chunk) -> Step | Segment:
        if isinstance(part, Chunk):
            return self._segment(part)
        sequence = part.sequence
        processor = self._processors.get(sequence)
        run = Run(sequence.request.sampling, len(sequence.tokens), processor)
        return Step(part, self._segment(part._replace(num_drafts=0)), run)

    def _segment(self, part: Row | Chunk) -> Segment:
        sequence, start = part.sequence, part.sequence.num_computed
        tokens = sequence.tokens[start : start + part.num_tokens]
        return Segment(tokens, start, part.level, self._table(sequence), part.num_scored)

    def _table(self, sequence: Sequence) -> BlockTable:
        """The sequence's block table, made again only when its pages have changed."""
        table = self._tables.get(sequence)
        if table is None or table.pages is not sequence.pages:
            table = self._tables[sequence] = self.pool.table(sequence.pages)
        return table

    def _complete(self, turn: Turn, made: _Made) -> None:
        """Tell the sinks what the pass made of each row and each prompt."""
        results = [made.get(part) for part in turn.slices]
        for part, result in zip(turn.slices, results, strict=True):
            if isinstance(result, Failed) and result.is_of_model:
                self._scheduler.withdraw(part.sequence)
        outcomes = self._scheduler.complete_turn(map(_tokens, results))
        for part, result, outcome in zip(turn.slices, results, outcomes, strict=True):
            if outcome is None:
                continue
            sequence, sink = part.sequence, self._sinks[part.sequence]
            if isinstance(part, Row):
                self._follow(sequence, outcome)
            match result:
                case Failed(error):
                    self._note_failed(sequence, error)
                    sink(error)
                    continue
                case ScoredPrompt() as scored:
                    sink(scored)
                case Sampled() as sampled:
                    for index, token in enumerate(outcome.tokens):
                        of_token = sampled.logprobs[index] if sampled.logprobs else None
                        sink(DecodedToken(token, part.level, of_token))
            if outcome.reason is not None:
                sink(outcome.reason)
            if isinstance(part, Chunk) and sequence.stage is Stage.RUNNING:
                sink(PromptComplete())

    def _note_failed(self, sequence: Sequence, error: ColmError) -> None:
        self.num_failed_rows += 1
        logger.warning(
            "request %s: failed alone: %s",
            sequence.request.request_id, error, exc_info=error.__cause__,
        )  # fmt: skip

    def _follow(self, sequence: Sequence, outcome: Outcome) -> None:
        """Let the grammar, if there is one, follow the tokens that a row has made."""
        processor = self._processors.get(sequence)
        if outcome.tokens and outcome.reason is None:
            self._grammar_steps.begin(sequence, processor)
        elif processor is not None:
            sequence.is_held = processor.is_preparing

    def _await_grammars(self, steps: list[Step]) -> None:
        """Let grammars that are about to be ready take their last moment; others make no token."""
        processors = [step.run.processor for step in steps if step.run.processor is not None]

        def are_ready() -> bool:
            return not any(processor.is_preparing for processor in processors)

        if not are_ready():
            with self._compute.lock:
                self._compute.lock.wait_for(are_ready, GRACE_S)

    def _go_on(self, sequence: Sequence, failure: ColmError | None) -> None:
        """The grammar of a sequence knows its next tokens, or has failed."""
        with self._compute.lock:
            processor = self._processors.get(sequence)
            if processor is None:
                return
            if failure is None:
                processor.is_preparing = False
                self._scheduler.resume(sequence)
                self._compute.lock.notify()
            else:
                sequence.is_held = True
                self._note_failed(sequence, failure)
                self._sinks[sequence](failure)

    def _fail_all(self, error: Unavailable) -> None:
        for sink in self._sinks.values():
            sink(error)


def _score_prompt(chunk: Chunk, segment: Segment, logits_TV: Tensor) -> ScoredPrompt | Failed:
    if None in best_tokens(logits_TV):
        return no_numbers()
    followers = chunk.sequence.tokens[segment.start + 1 : segment.stop + 1]
    num_top = chunk.sequence.request.sampling.prompt_logprobs or 0
    return ScoredPrompt(tuple(logprobs_of(logits_TV, followers, num_top)))


def _tokens(made: Sampled | ScoredPrompt | Failed | None) -> Seq[int] | None:
    """Those that a slice made; None: its sequence has failed."""
    if isinstance(made, Failed):
        return None
    return made.tokens if isinstance(made, Sampled) else ()
