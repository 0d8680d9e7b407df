"""Who has pages and what is computed next at a decode worker: pure, no clock.

Pages. A sequence is admitted with pages for its prompt and the output to expect, or refused at
once. Output beyond that takes page by page. When none is free the youngest other sequence is
preempted: it loses its pages and keeps its tokens; blocks of it stay findable until their pages
are needed. An older sequence is never preempted for a younger one, nor is one whose pages others
may be writing into: who finds only such younger ones sits out until their K and V have come.

Nobody starves: sequences that wait for pages get them back in order of age, and while any waits
nobody is admitted. The oldest of all is never preempted while it has pages, and any sequence
alone fits into the pool. So it ends, and then the next is the oldest.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import islice

from colm_serve.core import DecodeRequest
from colm_serve.decode_worker.pages import SequencePages
from colm_serve.decode_worker.sequence import Sequence, Stage
from colm_serve.decode_worker.turn import Chunk, Outcome, Row, Turn
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.kv.ledger import PageLedger


class DecodeScheduler:
    """Admission by pages, passes under a row and a token budget, preemption by age."""

    def __init__(
        self,
        ledger: PageLedger,
        *,
        page_size: int,
        max_rows: int,
        max_waiting: int,
        max_batch_tokens: int,
        expected_output_tokens: int,
        eos_token_ids: tuple[int, ...],
        cache_root: bytes,
    ) -> None:
        assert max_batch_tokens > max_rows, "a prompt computed here could stand still"
        self._ledger = ledger
        self._pages = SequencePages(ledger, page_size, cache_root)
        self._page_size = page_size
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._max_batch_tokens = max_batch_tokens
        self._expected_output_tokens = expected_output_tokens
        self._eos = frozenset(eos_token_ids)
        self._num_admitted = 0
        self._sequences: dict[Sequence, None] = {}  # oldest first
        self._waiting: list[Sequence] = []  # oldest first
        self._running: OrderedDict[Sequence, None] = OrderedDict()  # in turn
        self._prefilling: OrderedDict[Sequence, None] = OrderedDict()  # in turn
        self._in_pass: tuple[Row | Chunk, ...] = ()
        self._num_empty_turns = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run: K and V on the way or computed here, or preempted."""
        return len(self._sequences) - len(self._running)

    @property
    def has_work(self) -> bool:
        """The next turn may have something to compute or somebody to readmit."""
        num_ready = len(self._ready())
        if self._num_empty_turns * self._max_rows >= max(1, num_ready):
            return False  # Everyone had a turn and waits for KV that is on the way.
        return bool(num_ready or self._prefilling or self._waiting)

    def num_tokens_before(self, sequence: Sequence) -> int:
        """Tokens of other prompts that are computed while all of this one's would be."""
        most = sequence.num_missing
        others = (other for other in self._prefilling if other is not sequence)
        return sum(min(other.num_missing, most) for other in others)

    def num_running(self, num_levels: int) -> tuple[int, ...]:
        """Running sequences by level, level 1 first."""
        counts = [0] * num_levels
        for sequence in self._running:
            counts[sequence.level - 1] += 1
        return tuple(counts)

    def num_attended(self, num_levels: int) -> tuple[int, ...]:
        """Tokens that running sequences attend to by level, level 1 first."""
        counts = [0] * num_levels
        for sequence in self._running:
            counts[sequence.level - 1] += len(sequence.tokens)
        return tuple(counts)

    def admit(self, request: DecodeRequest) -> Sequence:
        """Reserve pages for the prompt and the output to expect, or refuse at once.

        Raises:
            InvalidArgument: it would not fit even into an empty pool.
            ResourceExhausted: the pages are not free now, or too many sequences wait.
        """
        eos = request.sampling.ending_token_ids(self._eos)
        sequence = Sequence(request, self._num_admitted, request.level, eos)
        if self._pages.num_pages(sequence.max_length) > self._ledger.num_pages:
            shown = f"prompt + output of {sequence.max_length}"
            limit = self._ledger.num_pages * self._page_size
            raise InvalidArgument("max_tokens", shown, f"to {limit}")
        if self.num_waiting >= self._max_waiting:
            raise ResourceExhausted(f"{self._max_waiting} requests are already waiting")
        if self._waiting:
            raise ResourceExhausted(f"{len(self._waiting)} preempted requests wait for KV pages")
        self._reserve(sequence)
        sequence.num_cached = sequence.num_computed
        self._num_admitted += 1
        self._sequences[sequence] = None
        return sequence

    def start(self, sequence: Sequence) -> None:
        """Nobody else writes into the sequence's pages: what they lack is computed here."""
        assert sequence.stage is Stage.AWAITING_KV, f"{sequence.stage} where KV was awaited"
        if sequence.num_missing:
            sequence.stage = Stage.PREFILLING
            self._prefilling[sequence] = None
        else:
            self._run(sequence)
        self._num_empty_turns = 0

    def next_turn(self) -> Turn:
        """Compose the next pass: rows, their drafts, then chunks of prompts with what is left.

        If more sequences run than rows fit, or more prompts are computed than tokens are left
        for, they take turns. One token at least is left to prompts. Those that are held run, but
        take no part.
        """
        assert not self._in_pass, "the last pass has not been completed"
        chosen = self._ready()[: self._max_rows]
        if len(self._running) > self._max_rows:
            for sequence in chosen:
                self._running.move_to_end(sequence)
        preempted = self._make_room(chosen)
        ready = [
            sequence
            for sequence in chosen
            if sequence.stage is Stage.RUNNING
            and self._pages.num_slots(sequence) >= len(sequence.tokens)
        ]
        num_drafts = self._allot_drafts(ready)
        rows = [Row(sequence, sequence.level, num_drafts.get(sequence, 0)) for sequence in ready]
        readmitted = self._readmit()
        budget = self._max_batch_tokens - sum(row.num_tokens for row in rows)
        slices: list[Row | Chunk] = [*rows, *self._next_chunks(budget)]
        slices.sort(key=lambda part: (-part.level, part.num_scored == 0))
        self._in_pass = tuple(slices)
        is_empty = not (slices or preempted or readmitted)
        self._num_empty_turns = self._num_empty_turns + 1 if is_empty else 0
        return Turn(self._in_pass, readmitted, preempted)

    def complete_turn(self, made: Iterable[Seq[int] | None]) -> list[Outcome | None]:
        """The pass has been computed.

        Args:
            made: for each slice the tokens that its step made; of a chunk none. None: it failed,
                and its sequence with it.

        Returns:
            For each slice what came of it; None where nobody wants the sequence any more.
        """
        slices, self._in_pass = self._in_pass, ()
        return [self._complete(part, tokens) for part, tokens in zip(slices, made, strict=True)]

    def withdraw(self, sequence: Sequence) -> None:
        """Let no later sequence find the blocks of this one: something in them is no number."""
        self._pages.withdraw(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Nobody wants the sequence any more: its pages are free now, or when its pass ends."""
        if sequence.stage is not Stage.FINISHED:
            sequence.stage = Stage.FINISHED
            if not any(part.sequence is sequence for part in self._in_pass):
                self._drop(sequence)

    def resume(self, sequence: Sequence) -> None:
        """A sequence that was held may take steps again."""
        sequence.is_held = False
        self._num_empty_turns = 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        self._ledger.check_integrity()
        held = {page for sequence in self._sequences for page in sequence.pages}
        assert len(held) + self._ledger.num_free == self._ledger.num_pages, "pages were lost"
        waiting = [s for s in self._sequences if s.stage is Stage.WAITING]
        assert waiting == self._waiting, "the preempted are not in order of age"
        assert not any(s.pages for s in waiting), "a preempted sequence has pages"
        for stage, queue in (
            (Stage.RUNNING, self._running),
            (Stage.PREFILLING, self._prefilling),
        ):
            queued = {s for s in queue if s.stage is not Stage.FINISHED}
            assert queued == {s for s in self._sequences if s.stage is stage}, f"{stage} differ"

    def _reserve(self, sequence: Sequence) -> None:
        """Give a sequence its first pages, but none that those with pages may need next."""
        num_tokens = len(sequence.tokens) + self._expected_output_tokens
        num_growing = sum(
            self._pages.num_lacking(other, other.max_length) > 0
            for other in self._sequences
            if other.pages
        )
        self._pages.reserve(sequence, min(num_tokens, sequence.max_length), num_growing)
        sequence.stage = Stage.AWAITING_KV

    def _ready(self) -> list[Sequence]:
        return [sequence for sequence in self._running if not sequence.is_held]

    def _run(self, sequence: Sequence) -> None:
        self._pages.publish(sequence)
        sequence.stage = Stage.RUNNING
        self._running[sequence] = None

    def _make_room(self, chosen: Seq[Sequence]) -> tuple[Sequence, ...]:
        """Let each row have a slot for its last token, oldest first; returns the preempted."""
        lacking = [s for s in chosen if self._pages.num_slots(s) < len(s.tokens)]
        preempted: list[Sequence] = []
        for sequence in sorted(lacking, key=lambda sequence: sequence.age):
            while sequence.stage is Stage.RUNNING:
                if self._pages.grow(sequence, len(sequence.tokens)):
                    break
                victim = self._find_victim(sequence)
                if victim is None:
                    break
                self._preempt(victim)
                preempted.append(victim)
        return tuple(preempted)

    def _allot_drafts(self, rows: Seq[Sequence]) -> dict[Sequence, int]:
        """How many drafts of each row to verify: by budget, by `max_tokens`, by free pages."""
        num_left = self._max_batch_tokens - len(rows) - bool(self._prefilling)
        num_drafts = {}
        for sequence in rows:
            if sequence.num_drafts:
                num_tokens = len(sequence.tokens)
                # A step makes a token more than it verifies.
                most = min(sequence.num_drafts, num_left, sequence.max_length - num_tokens - 1)
                if not self._pages.grow(sequence, num_tokens + most):
                    most = self._pages.num_slots(sequence) - num_tokens
                num_drafts[sequence] = most
                num_left -= most
        return num_drafts

    def _find_victim(self, asking: Sequence) -> Sequence | None:
        """The youngest with pages to lose, `asking` itself if it is that; None: not now."""
        is_kv_on_the_way = False
        for sequence in reversed(self._sequences):
            if sequence is asking:
                break
            if sequence.stage is Stage.AWAITING_KV:
                is_kv_on_the_way = True
            elif sequence.pages:
                return sequence
        return None if is_kv_on_the_way else asking

    def _preempt(self, sequence: Sequence) -> None:
        self._running.pop(sequence, None)
        self._prefilling.pop(sequence, None)
        self._pages.publish(sequence)
        self._pages.release(sequence)
        sequence.stage = Stage.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=lambda waiting: waiting.age)

    def _readmit(self) -> tuple[Sequence, ...]:
        """Give pages to those that were preempted, in order of age, as long as there are some."""
        readmitted = []
        while self._waiting:
            try:
                self._reserve(self._waiting[0])
            except ResourceExhausted:
                break
            readmitted.append(self._waiting.pop(0))
        return tuple(readmitted)

    def _next_chunks(self, budget: int) -> list[Chunk]:
        """An equal share of the budget for each prompt; what one does not need the others get."""
        prompts = _take_turns(self._prefilling, budget)
        chunks = []
        for num_done, sequence in enumerate(sorted(prompts, key=lambda s: s.num_missing)):
            num_tokens = min(sequence.num_missing, budget // (len(prompts) - num_done))
            chunks.append(_next_chunk(sequence, num_tokens))
            budget -= chunks[-1].num_tokens
        return chunks

    def _complete(self, part: Row | Chunk, tokens: Seq[int] | None) -> Outcome | None:
        sequence = part.sequence
        if sequence.stage is Stage.FINISHED:
            self._drop(sequence)
            return None
        if tokens is None:
            self._drop(sequence)
            return Outcome((), None)
        if isinstance(part, Chunk):
            sequence.num_computed += part.num_tokens
            sequence.num_prompt_scored += part.num_scored
            if sequence.num_missing == 0:
                del self._prefilling[sequence]
                self._run(sequence)
            return Outcome((), None)
        assert len(tokens) <= part.num_tokens, f"{len(tokens)} tokens of {part.num_tokens}"
        kept, reason = sequence.extend(tuple(tokens))
        sequence.num_computed = sequence.num_prefill
        if reason is not None:
            self._pages.publish(sequence)
            self._drop(sequence)
        return Outcome(kept, reason)

    def _drop(self, sequence: Sequence) -> None:
        sequence.stage = Stage.FINISHED
        del self._sequences[sequence]
        self._running.pop(sequence, None)
        self._prefilling.pop(sequence, None)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._pages.release(sequence)
        self._num_empty_turns = 0


def _next_chunk(sequence: Sequence, num_tokens: int) -> Chunk:
    """The next tokens at most, all of them scored or none."""
    if not sequence.is_scoring:
        return Chunk(sequence, num_tokens)
    # A sequence that was preempted computes anew what has been scored, but does not score it.
    num_known = sequence.num_prompt_scored - sequence.num_computed
    if num_known > 0:
        return Chunk(sequence, min(num_tokens, num_known))
    return Chunk(sequence, num_tokens, sequence.level, num_tokens)


def _take_turns(queue: OrderedDict[Sequence, None], num: int) -> list[Sequence]:
    """The first `num` of a queue; if there are more, these come last the next time."""
    chosen = list(islice(queue, num))
    if len(queue) > num:
        for sequence in chosen:
            queue.move_to_end(sequence)
    return chosen
