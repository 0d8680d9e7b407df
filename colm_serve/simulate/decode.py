"""A decode worker on the virtual clock: the rules of the real one, steps that take their cost.

It neither speculates nor scores prompts; texts end by length.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Mapping

from colm_serve.config import DecodeConfig
from colm_serve.core import DecodeStatus, Member
from colm_serve.decode_worker.prefill_plan import LocalLoad
from colm_serve.decode_worker.sequence import Stage
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.latency.rate import COMPUTE_MEMORY_TOKENS, Rate
from colm_serve.simulate.clock import VirtualClock
from colm_serve.simulate.costs import WorkerCosts
from colm_serve.simulate.kv_fetch import KvFetcher
from colm_serve.simulate.prefill import VirtualPrefillWorker
from colm_serve.simulate.rows import Rows, take_turns
from colm_serve.simulate.sequence import VirtualSequence
from colm_serve.simulate.sequence_pages import CountedSequencePages
from colm_serve.simulate.steps import StepRun


class VirtualDecodeWorker:
    """Admission by pages, mixed levels, chunks of prompts beside rows, preemption by age."""

    def __init__(
        self,
        member: Member,
        config: DecodeConfig,
        costs: WorkerCosts,
        clock: VirtualClock,
        prefill: Mapping[Member, VirtualPrefillWorker],
    ) -> None:
        self.member = member
        self.num_preemptions = 0
        self._config = config
        self._costs = costs
        self._step_cost = costs.step.step_cost
        self._clock = clock
        self._pages = CountedSequencePages(
            config.num_pages, config.page_size, config.expected_output_tokens
        )
        self._fetcher = KvFetcher(
            clock, costs, prefill, config.local_prefill_tokens, self.local_load, self._begin
        )
        self._rows = Rows(self._step_cost, config.max_rows, self._pages)
        self._prefill_rate = Rate(COMPUTE_MEMORY_TOKENS)
        self._num_admitted = 0
        self._sequences: dict[VirtualSequence, None] = {}  # oldest first
        self._waiting: list[VirtualSequence] = []  # oldest first
        self._prefilling: OrderedDict[VirtualSequence, None] = OrderedDict()  # in turn
        self._moves: dict[VirtualSequence, int] = {}
        self._cancelled: list[VirtualSequence] = []  # in the middle of a step
        self._chunks: list[tuple[VirtualSequence, int]] = []  # of this step
        self._run: StepRun | None = None
        self._num_steps = 0
        self._version = 0

    @property
    def num_tokens_by_level(self) -> list[int]:
        """Tokens made, level 1 first."""
        return self._rows.num_tokens_by_level

    def admit(self, sequence: VirtualSequence) -> None:
        """Reserve pages for the prompt and the output to expect, or refuse at once.

        Raises:
            InvalidArgument: it would not fit even into an empty pool.
            ResourceExhausted: the pages are not free now, or too many sequences wait.
        """
        if not self._pages.fits(sequence):
            limit = self._config.num_pages * self._config.page_size
            raise InvalidArgument("max_tokens", sequence.max_length, f"to {limit} with the prompt")
        if self._num_waiting >= self._config.max_waiting:
            raise ResourceExhausted(f"{self._config.max_waiting} requests are already waiting")
        if self._waiting:
            raise ResourceExhausted(f"{len(self._waiting)} preempted requests wait for KV pages")
        if not self._pages.reserve(sequence):
            raise ResourceExhausted(f"{self._pages.counts.num_free} KV pages are free: too few")
        sequence.age = self._num_admitted
        sequence.num_cached = sequence.num_computed
        self._num_admitted += 1
        self._sequences[sequence] = None
        self._fetcher.fetch(sequence)

    def move_level(self, sequence: VirtualSequence, level: int) -> None:
        """Make the sequence's tokens at `level` from its next step on."""
        if sequence.stage is not Stage.FINISHED:
            self._moves[sequence] = level
            self._wake()

    def cancel(self, sequence: VirtualSequence) -> None:
        """Nobody wants it any more: its pages are free now, or when its step ends."""
        if sequence.stage is Stage.FINISHED:
            return
        self._fetcher.cancel(sequence)
        sequence.stage = Stage.FINISHED
        if self._is_in_step(sequence):
            self._cancelled.append(sequence)
        else:
            self._drop(sequence)
        self._wake()

    @property
    def step_s(self) -> float:
        """Seconds of the step under way, and those to follow; 0 if there is none."""
        return 0.0 if self._run is None else self._run.first_s

    def num_output(self, sequence: VirtualSequence) -> int:
        """Tokens that it has by now."""
        return sequence.num_output + self._rows.num_new_tokens(sequence, self._num_steps_done)

    @property
    def _num_steps_done(self) -> int:
        return 0 if self._run is None else self._run.num_done(self._clock.now)

    def local_load(self, sequence: VirtualSequence) -> LocalLoad:
        """What computing the tokens that the sequence lacks would cost, if that may be chosen."""
        most = sequence.num_missing
        others = [other for other in self._prefilling if other is not sequence]
        return LocalLoad(
            tokens_per_s=self._prefill_rate.per_s if self._config.adaptive_prefill else None,
            num_queued_tokens=sum([min(other.num_missing, most) for other in others]),
            num_rows=len(self._rows.running),
        )

    def status(self) -> DecodeStatus:
        return DecodeStatus(
            worker_id=self.member.worker_id,
            epoch=self.member.epoch,
            kv_identity=self.member.kv_identity,
            num_levels=self._costs.num_levels,
            max_rows=self._config.max_rows,
            num_waiting=self._num_waiting,
            num_running=tuple(self._rows.num_by_level),
            num_free_pages=self._pages.counts.num_free,
            num_pages=self._config.num_pages,
            page_size=self._config.page_size,
            step_cost=self._step_cost,
            prefill_tokens_per_s=self._prefill_rate.per_s or 0.0,
            expected_output_tokens=self._config.expected_output_tokens,
            num_preemptions=self.num_preemptions,
            num_drafted=0,
            num_accepted=0,
            num_attended=self._rows.num_attended(self._num_steps_done),
            transfer_cost=self._costs.transfer_cost,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        self._pages.check_integrity(len(self._sequences))
        assert sum(self._rows.num_by_level) == len(self._rows.running), "rows are off"

    @property
    def _num_waiting(self) -> int:
        return len(self._sequences) - len(self._rows.running)

    def _begin(self, sequence: VirtualSequence) -> None:
        """What was to be shipped is here: compute the rest, then make tokens."""
        if sequence.stage is not Stage.AWAITING_KV:
            return
        if sequence.num_missing:
            sequence.stage = Stage.PREFILLING
            self._prefilling[sequence] = None
        else:
            self._start(sequence)
        self._wake()

    def _start(self, sequence: VirtualSequence) -> None:
        self._pages.publish(sequence)
        sequence.stage = Stage.RUNNING
        self._rows.add(sequence)

    def _wake(self) -> None:
        """Something has changed: have the steps end early enough for it to take effect."""
        if self._run is None:
            self._take_turn()
            return
        num_steps = self._run.num_done(self._clock.now) + 1
        if num_steps < self._num_steps:
            self._end_after(self._run, num_steps)

    def _end_after(self, run: StepRun, num_steps: int) -> None:
        self._num_steps = num_steps
        self._version += 1
        self._clock.at(run.end_of(num_steps), self._end, run, self._version)

    def _end(self, run: StepRun, version: int) -> None:
        """The steps are done, unless they were told to end earlier."""
        if version != self._version:
            return
        self._run = None
        for sequence in self._rows.complete(self._num_steps):
            self._finish(sequence)
        if self._chunks:
            self._complete_chunks(self._clock.now - run.begin)
        if self._cancelled:
            cancelled, self._cancelled = self._cancelled, []
            for sequence in cancelled:
                self._drop(sequence)
        self._take_turn()

    def _complete_chunks(self, seconds: float) -> None:
        chunks, self._chunks = self._chunks, []
        self._prefill_rate.add(sum(num_tokens for _, num_tokens in chunks), seconds)
        for sequence, num_tokens in chunks:
            sequence.num_computed += num_tokens
            if sequence.stage is Stage.PREFILLING and sequence.num_missing == 0:
                del self._prefilling[sequence]
                self._start(sequence)

    def _finish(self, sequence: VirtualSequence) -> None:
        sequence.num_computed = sequence.num_prefill
        self._pages.publish(sequence)
        sequence.stage = Stage.FINISHED
        sequence.ended_at = self._clock.now
        self._drop(sequence)
        sequence.on_end(sequence)

    def _take_turn(self) -> None:
        """Compose the next step, and all that follow unchanged."""
        if self._moves:
            for sequence, level in self._moves.items():
                self._rows.move(sequence, level)
            self._moves.clear()
        num_rows = self._rows.choose(self._make_room, may_be_empty=bool(self._prefilling))
        self._readmit()
        self._chunks = self._next_chunks(self._config.max_batch_tokens - num_rows)
        if not (num_rows or self._chunks):
            return
        first_s, growth_s = self._rows.step_s()
        run = self._run = StepRun(self._clock.now, first_s + self._chunks_s(num_rows), growth_s)
        self._end_after(run, 1 if self._chunks else self._rows.num_steps_ahead())
        self._rows.tell_first_tokens(run.end_of(1))

    def _make_room(self, lacking: list[VirtualSequence]) -> None:
        """Let each row have a place for its last token, oldest first."""
        for sequence in sorted(lacking, key=lambda sequence: sequence.age):
            while sequence.stage is Stage.RUNNING and not self._pages.grow(sequence):
                victim = self._find_victim(sequence)
                if victim is None:
                    break
                self._preempt(victim)

    def _find_victim(self, asking: VirtualSequence) -> VirtualSequence | None:
        """The youngest with pages to lose, `asking` itself if it is that; None: not now."""
        is_kv_on_the_way = False
        for sequence in reversed(self._sequences):
            if sequence is asking:
                break
            if sequence.stage is Stage.AWAITING_KV:
                is_kv_on_the_way = True
            elif sequence.holding.num_pages:
                return sequence
        return None if is_kv_on_the_way else asking

    def _preempt(self, sequence: VirtualSequence) -> None:
        self._rows.remove(sequence)
        self._prefilling.pop(sequence, None)
        if sequence.stage is Stage.RUNNING:
            sequence.num_computed = sequence.num_prefill
        self._pages.publish(sequence)
        self._pages.release(sequence)
        sequence.stage = Stage.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=lambda waiting: waiting.age)

    def _readmit(self) -> None:
        """Give pages to those that were preempted, in order of age, as long as there are some."""
        while self._waiting and self._pages.reserve(self._waiting[0]):
            sequence = self._waiting.pop(0)
            sequence.stage = Stage.AWAITING_KV
            # As the real worker's session hears of it: while the next step is under way.
            self._clock.at(self._clock.now, self._fetcher.fetch, sequence)

    def _next_chunks(self, budget: int) -> list[tuple[VirtualSequence, int]]:
        """An equal share of the budget for each prompt; what one does not need the others get."""
        if not self._prefilling:
            return []
        prompts = take_turns(self._prefilling, budget)
        chunks = []
        for num_done, sequence in enumerate(sorted(prompts, key=lambda s: s.num_missing)):
            num_tokens = min(sequence.num_missing, budget // (len(prompts) - num_done))
            chunks.append((sequence, num_tokens))
            budget -= num_tokens
        return chunks

    def _chunks_s(self, num_rows: int) -> float:
        """What the chunks add to a step; where there are no rows, they read chain 1 themselves."""
        if not self._chunks:
            return 0.0
        num_tokens = sum(num_tokens for _, num_tokens in self._chunks)
        weights_s = 0.0 if num_rows else self._step_cost.chain_s[0]
        return weights_s + num_tokens * self._costs.prefill.token_s

    def _is_in_step(self, sequence: VirtualSequence) -> bool:
        if self._run is None:
            return False
        return self._rows.is_in_step(sequence) or any(of is sequence for of, _ in self._chunks)

    def _drop(self, sequence: VirtualSequence) -> None:
        self._rows.remove(sequence)
        self._prefilling.pop(sequence, None)
        self._moves.pop(sequence, None)
        del self._sequences[sequence]
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._pages.release(sequence)
