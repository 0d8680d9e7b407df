"""Who is admitted, who is in the next step, whose prompt is computed here: pure, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum, auto

from colm_serve.core import DecodeRequest, FinishReason
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.kv.ledger import PageLedger, block_digests


class Stage(Enum):
    """Where a sequence is in its life at this worker."""

    AWAITING_KV = auto()  # its prompt's KV is on the way, or its turn to be computed here is
    RUNNING = auto()
    FINISHED = auto()


@dataclass
class Sequence:
    """One request at its decode worker; `num_computed` tokens have their KV in the pages."""

    request: DecodeRequest
    pages: list[int]
    num_cached: int
    level: int
    ending_token_ids: frozenset[int]
    tokens: list[int] = field(init=False)
    num_computed: int = field(init=False)
    num_shipped: int = 0
    stage: Stage = Stage.AWAITING_KV

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.num_computed = self.num_cached

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_prefill(self) -> int:
        """Prompt tokens whose KV comes from a prefill; the last one's comes from its own step."""
        return self.num_prompt - 1

    @property
    def num_missing(self) -> int:
        return self.num_prefill - self.num_computed


@dataclass(frozen=True)
class LocalChunk:
    """The next `num_tokens` prompt tokens of a sequence, to be computed on this worker."""

    sequence: Sequence
    num_tokens: int


class DecodeScheduler:
    """Admission by pages, step composition by rows, local prefill by a token budget."""

    def __init__(
        self,
        ledger: PageLedger,
        *,
        page_size: int,
        max_rows: int,
        max_waiting: int,
        chunk_tokens: int,
        eos_token_ids: tuple[int, ...],
        cache_root: bytes,
    ) -> None:
        self._ledger = ledger
        self._page_size = page_size
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._chunk_tokens = chunk_tokens
        self._eos = frozenset(eos_token_ids)
        self._cache_root = cache_root
        self._sequences: dict[int, Sequence] = {}
        self._running: OrderedDict[int, Sequence] = OrderedDict()
        self._local: OrderedDict[int, Sequence] = OrderedDict()
        self._in_pass: tuple[Sequence, ...] = ()

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self._running)

    @property
    def has_work(self) -> bool:
        """There is a step to make or a prompt to compute."""
        return bool(self._running or self._local)

    def num_running(self, num_levels: int) -> tuple[int, ...]:
        """Running sequences by level, level 1 first."""
        counts = [0] * num_levels
        for sequence in self._running.values():
            counts[sequence.level - 1] += 1
        return tuple(counts)

    def admit(self, request: DecodeRequest) -> Sequence:
        """Reserve every page that the request can come to need, or refuse at once.

        Raises:
            InvalidArgument: it would not fit even into an empty pool.
            ResourceExhausted: the pages are not free now, or too many sequences wait.
        """
        num_tokens = len(request.prompt) + request.sampling.max_tokens
        num_pages = -(-num_tokens // self._page_size)
        if num_pages > self._ledger.num_pages:
            limit = self._ledger.num_pages * self._page_size
            raise InvalidArgument("max_tokens", f"prompt + output of {num_tokens}", f"to {limit}")
        if self.num_waiting >= self._max_waiting:
            raise ResourceExhausted(f"{self._max_waiting} requests are already waiting")
        # The last prompt token is always run: it makes the first token.
        digests = self._digests(request.prompt[:-1])
        pages = self._ledger.hold_prefix(digests)
        num_cached = len(pages) * self._page_size
        try:
            pages += self._ledger.allocate(num_pages - len(pages))
        except ResourceExhausted:
            self._ledger.release(pages)
            raise
        sequence = Sequence(
            request,
            pages,
            num_cached,
            request.level,
            request.sampling.ending_token_ids(self._eos),
        )
        self._sequences[id(sequence)] = sequence
        return sequence

    def compute_here(self, sequence: Sequence) -> None:
        """Have the rest of the prompt's KV computed on this worker."""
        self._local[id(sequence)] = sequence

    def start(self, sequence: Sequence) -> None:
        """The prompt's KV is complete: the sequence runs from the next step on."""
        assert sequence.num_missing == 0, f"{sequence.num_missing} tokens lack their KV"
        self._publish(sequence)
        sequence.stage = Stage.RUNNING
        self._running[id(sequence)] = sequence

    def next_rows(self) -> tuple[Sequence, ...]:
        """The sequences of the next step, highest level first; all take turns if too many run."""
        assert not self._in_pass, "the last pass has not been completed"
        chosen = list(self._running.values())[: self._max_rows]
        if len(self._running) > self._max_rows:
            for sequence in chosen:
                self._running.move_to_end(id(sequence))
        self._in_pass = tuple(sorted(chosen, key=lambda s: -s.level))
        return self._in_pass

    def complete_rows(self, tokens: tuple[int, ...]) -> list[tuple[Sequence, FinishReason | None]]:
        """Give each row of the last step its token; those that end are dropped.

        Returns:
            The sequences still wanted, each with its reason if it has ended.
        """
        rows, self._in_pass = self._in_pass, ()
        outcome = []
        for sequence, token in zip(rows, tokens, strict=True):
            if sequence.stage is Stage.FINISHED:
                self._drop(sequence)
                continue
            sequence.num_computed = len(sequence.tokens)
            sequence.tokens.append(token)
            reason = self._finish_reason(sequence, token)
            if reason is not None:
                self._publish(sequence)
                self._drop(sequence)
            outcome.append((sequence, reason))
        return outcome

    def next_chunks(self) -> tuple[LocalChunk, ...]:
        """Prompt chunks to compute here in one pass, in order of arrival, up to the budget."""
        assert not self._in_pass, "the last pass has not been completed"
        budget = self._chunk_tokens
        chunks = []
        for sequence in self._local.values():
            num_tokens = min(sequence.num_missing, budget)
            if num_tokens == 0:
                break
            chunks.append(LocalChunk(sequence, num_tokens))
            budget -= num_tokens
        self._in_pass = tuple(chunk.sequence for chunk in chunks)
        return tuple(chunks)

    def complete_chunks(self, chunks: tuple[LocalChunk, ...]) -> list[Sequence]:
        """The chunks have been computed; returns the sequences whose prompts are now complete."""
        self._in_pass = ()
        complete = []
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            if sequence.stage is Stage.FINISHED:
                self._drop(sequence)
            elif sequence.num_missing == 0:
                del self._local[id(sequence)]
                complete.append(sequence)
        return complete

    def cancel(self, sequence: Sequence) -> None:
        """Nobody wants the sequence any more: its pages are free now, or when its pass ends."""
        if sequence.stage is not Stage.FINISHED:
            sequence.stage = Stage.FINISHED
            if not any(other is sequence for other in self._in_pass):
                self._drop(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        self._ledger.check_integrity()
        held = {page for s in self._sequences.values() for page in s.pages}
        assert len(held) + self._ledger.num_free == self._ledger.num_pages, "pages were lost"

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        if token in sequence.ending_token_ids:
            return FinishReason.STOP
        max_tokens = sequence.request.sampling.max_tokens
        if len(sequence.tokens) - sequence.num_prompt >= max_tokens:
            return FinishReason.LENGTH
        return None

    def _drop(self, sequence: Sequence) -> None:
        sequence.stage = Stage.FINISHED
        self._running.pop(id(sequence), None)
        self._local.pop(id(sequence), None)
        if self._sequences.pop(id(sequence), None) is not None:
            self._ledger.release(sequence.pages)
            sequence.pages = []

    def _publish(self, sequence: Sequence) -> None:
        """Let later prompts find the blocks whose KV is complete."""
        digests = self._digests(sequence.tokens[: sequence.num_computed])
        for page, digest in zip(sequence.pages, digests, strict=False):
            self._ledger.publish(page, digest)

    def _digests(self, tokens: list[int] | tuple[int, ...]) -> list[bytes]:
        return block_digests(tokens, self._page_size, self._cache_root)
