"""The decode scheduler under any history, against a model of what stands in the memory."""

from __future__ import annotations

from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from colm_serve.decode_worker.sequence import Sequence, Stage
from colm_serve.decode_worker.turn import Chunk, Outcome, Row, Turn
from colm_serve.errors import InvalidArgument, ResourceExhausted
from tests.decode_worker.scheduling import EOS, PAGE_SIZE, make_request, make_scheduler

Place = tuple[int, int]
#: What a draft that was refused leaves behind.
GARBAGE = (-1,)


class SchedulerMachine(RuleBasedStateMachine):
    """Sequences come with few distinct prompts, so prefixes are shared, and leave at any time."""

    @initialize(
        num_pages=st.integers(4, 12),
        max_rows=st.integers(1, 4),
        num_more=st.integers(1, 9),
        expected=st.integers(1, 4),
    )
    def begin(self, num_pages: int, max_rows: int, num_more: int, expected: int) -> None:
        self.max_rows, self.max_batch_tokens = max_rows, max_rows + num_more
        self.scheduler = make_scheduler(num_pages, max_rows, 5, self.max_batch_tokens, expected)
        self.ledger = self.scheduler._ledger
        self.live: list[Sequence] = []
        self.turn: Turn | None = None
        # The truth about the memory: which prefix the KV in (page, slot) was computed from.
        self.memory: dict[Place, tuple[int, ...]] = {}
        self.texts: dict[Sequence, list[int]] = {}

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=10),
        max_tokens=st.integers(1, 30),
        level=st.integers(1, 3),
        salt=st.sampled_from(["", "a"]),
    )
    def admit(self, prompt: list[int], max_tokens: int, level: int, salt: str) -> None:
        num_free = self.ledger.num_free
        request = make_request(prompt, max_tokens, level, cache_salt=salt)
        try:
            sequence = self.scheduler.admit(request)
        except (ResourceExhausted, InvalidArgument):
            assert self.ledger.num_free == num_free
            return
        assert not self.of_stage(Stage.WAITING), "it went before those who wait for pages"
        self.live.append(sequence)
        self.texts[sequence] = list(prompt)
        self.check_memory(sequence)

    def of_stage(self, stage: Stage) -> list[Sequence]:
        return [sequence for sequence in self.live if sequence.stage is stage]

    def place(self, sequence: Sequence, token: int) -> Place:
        return sequence.pages[token // PAGE_SIZE], token % PAGE_SIZE

    def prefix(self, sequence: Sequence, token: int) -> tuple[int, ...]:
        """What the KV of a token depends on; blocks of another salt are not it."""
        salt = hash(sequence.request.cache_salt)
        return (salt, *sequence.tokens[: token + 1])

    def check_memory(self, sequence: Sequence) -> None:
        for token in range(sequence.num_computed):
            found = self.memory.get(self.place(sequence, token))
            assert found == self.prefix(sequence, token), f"the KV of token {token} is another's"

    def pick(self, which: int, sequences: list[Sequence]) -> list[Sequence]:
        """One of these, if there are any."""
        return [sequences[which % len(sequences)]] if sequences else []

    @rule(which=st.integers(0, 5), num_tokens=st.integers(0, 14), is_end=st.booleans())
    def ship(self, which: int, num_tokens: int, is_end: bool) -> None:
        for sequence in self.pick(which, self.of_stage(Stage.AWAITING_KV)):
            stop = min(sequence.num_prefill, sequence.num_computed + num_tokens)
            for token in range(sequence.num_computed, stop):
                self.memory[self.place(sequence, token)] = self.prefix(sequence, token)
            sequence.num_computed = stop
            if is_end:
                self.scheduler.start(sequence)

    @rule(which=st.integers(0, 5), level=st.integers(1, 3), num_drafts=st.integers(0, 5))
    def change(self, which: int, level: int, num_drafts: int) -> None:
        for sequence in self.pick(which, self.live):
            sequence.level, sequence.num_drafts = level, num_drafts

    @rule(num_turns=st.integers(1, 8), num_made=st.integers(1, 4), is_last_open=st.booleans())
    def run(self, num_turns: int, num_made: int, is_last_open: bool) -> None:
        """Several turns with nothing between them; the last may stay open for others to see."""
        for _ in range(num_turns):
            self.end_turn(num_made, token=1)
            self.begin_turn()
            self.is_sound()
        if not is_last_open:
            self.end_turn(num_made, token=1)

    def begin_turn(self) -> None:
        num_preempted = {sequence: sequence.num_preemptions for sequence in self.live}
        oldest = next((sequence for sequence in self.live if sequence.pages), None)
        awaiting = self.of_stage(Stage.AWAITING_KV)
        had_work = self.scheduler.has_work
        turn = self.turn = self.scheduler.next_turn()
        assert had_work or not turn.slices, "it would have slept over work"
        rows = [part for part in turn.slices if isinstance(part, Row)]
        chunks = [part for part in turn.slices if isinstance(part, Chunk)]
        assert len(rows) <= self.max_rows
        assert sum(part.num_tokens for part in turn.slices) <= self.max_batch_tokens
        keys = [(-part.level, part.num_scored == 0) for part in turn.slices]
        assert keys == sorted(keys)
        assert bool(chunks) == bool(self.of_stage(Stage.PREFILLING)), "prompts stand still"
        assert all(chunk.num_tokens >= 1 for chunk in chunks)
        self.check_preempted(turn, num_preempted)
        assert oldest not in turn.preempted, "the oldest is never preempted"
        assert not set(awaiting) & set(turn.preempted), "others write into its pages"
        for part in turn.slices:
            self.check_memory(part.sequence)
            stop = part.sequence.num_computed + part.num_tokens
            assert stop <= len(part.sequence.pages) * PAGE_SIZE, "it writes beyond its pages"
            assert stop <= part.sequence.max_length, "more drafts than the text may have tokens"
            assert all(
                self.ledger._num_holders[self.place(part.sequence, token)[0]] == 1
                for token in range(part.sequence.num_computed, stop)
            ), "it writes where others read"

    def check_preempted(self, turn: Turn, num_before: dict[Sequence, int]) -> None:
        counted = {s for s in self.live if s.num_preemptions > num_before[s]}
        assert counted == set(turn.preempted)
        for sequence in turn.preempted:
            # Only for an older one, or because it asked and was the youngest with pages to give.
            younger = [s for s in self.live if s.age > sequence.age and s.pages]
            assert all(s.stage is Stage.AWAITING_KV for s in younger if s not in turn.readmitted), (
                "an older one was preempted before a younger"
            )

    @rule(
        num_made=st.integers(1, 4),
        token=st.sampled_from([1, 2, EOS]),
        failing=st.none() | st.integers(0, 5),
    )
    def end_turn(self, num_made: int, token: int, failing: int | None = None) -> None:
        """Each row makes so many tokens, or what its drafts allow; the last may end its text.

        The `failing`-th slice makes none, and what its sequence has in its pages is worth nothing.
        """
        if self.turn is None:
            return
        made: list[tuple[int, ...] | None] = []
        for i, part in enumerate(self.turn.slices):
            most = part.num_tokens if isinstance(part, Row) else 0
            tokens = [*[2, 1, 2, 1][: num_made - 1], token][:most]
            made.append(None if i == failing else tuple(tokens))
            self.write(part, tokens)
            if i == failing:
                self.scheduler.withdraw(part.sequence)
                own = [p for p in part.sequence.pages if self.ledger._num_holders[p] == 1]
                self.memory |= {(p, slot): GARBAGE for p in own for slot in range(PAGE_SIZE)}
        turn, self.turn = self.turn, None
        outcomes = self.scheduler.complete_turn(made)
        for part, tokens_made, outcome in zip(turn.slices, made, outcomes, strict=True):
            if outcome is None:
                assert part.sequence not in self.live
                continue
            if tokens_made is None:
                assert outcome == Outcome((), None)
                assert not part.sequence.pages, "a failed sequence kept pages"
                self.live.remove(part.sequence)
                continue
            self.texts[part.sequence] += outcome.tokens
            assert outcome.tokens == tokens_made[: len(outcome.tokens)]
            if outcome.reason is not None:
                self.live.remove(part.sequence)

    def write(self, part: Row | Chunk, made: list[int]) -> None:
        """What a pass writes is written, cancelled or not."""
        sequence, start = part.sequence, part.sequence.num_computed
        text = (hash(sequence.request.cache_salt), *sequence.tokens, *made)
        for token in range(start, start + part.num_tokens):
            is_real = isinstance(part, Chunk) or token - start < len(made)
            kept = text[: token + 2] if is_real else GARBAGE
            self.memory[self.place(sequence, token)] = kept

    @rule(which=st.integers(0, 5))
    def cancel(self, which: int) -> None:
        for sequence in self.pick(which, self.live):
            self.live.remove(sequence)
            self.scheduler.cancel(sequence)

    @invariant()
    def is_sound(self) -> None:
        self.scheduler.check_integrity()
        owners: dict[int, list[Sequence]] = {}
        for sequence in self.live:
            assert sequence.tokens == self.texts[sequence], "tokens were lost"
            assert len(sequence.pages) == len(set(sequence.pages))
            for page in sequence.pages:
                owners.setdefault(page, []).append(sequence)
        for page, sharing in owners.items():
            if len(sharing) > 1:
                self.check_shared(page, sharing)

    def check_shared(self, page: int, sharing: list[Sequence]) -> None:
        """A page has two owners only as the same block of the same prefix."""
        blocks = {sequence.pages.index(page) for sequence in sharing}
        assert len(blocks) == 1, "a page stands at two places"
        stop = (blocks.pop() + 1) * PAGE_SIZE
        assert len({self.prefix(sequence, stop - 1) for sequence in sharing}) == 1
        assert all(sequence.num_computed >= stop for sequence in sharing), "it is written still"

    def teardown(self) -> None:
        """Whatever has happened, everyone who is still there gets to the end of the text."""
        if not hasattr(self, "live"):
            return
        if self.turn is not None:
            self.finish_turn(self.turn)
        for _ in range(1000):
            if not self.live:
                break
            for sequence in self.of_stage(Stage.AWAITING_KV):
                self.scheduler.start(sequence)
            assert self.scheduler.has_work, "they wait for each other"
            self.finish_turn(self.scheduler.next_turn())
            self.live = [s for s in self.live if s.stage is not Stage.FINISHED]
        assert not self.live, "they never end"
        self.scheduler.check_integrity()
        assert self.ledger.num_free == self.ledger.num_pages
        assert not self.scheduler.has_work
        assert self.scheduler.num_waiting == 0

    def finish_turn(self, turn: Turn) -> None:
        self.scheduler.complete_turn(
            [(1,) if isinstance(part, Row) else () for part in turn.slices]
        )


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase


def test_long_histories() -> None:
    """The same machine, driven for longer than hypothesis would."""
    num_preemptions = sum(run_history(Random(seed)) for seed in range(60))
    assert num_preemptions > 200


def run_history(random: Random) -> int:
    """Returns how often somebody was preempted."""
    machine = SchedulerMachine()
    machine.begin(
        random.randint(4, 12), random.randint(1, 4), random.randint(1, 9), random.randint(1, 4)
    )
    operations = ("admit", "ship", "change", "cancel", "run")
    for operation in random.choices(operations, (6, 6, 1, 0.3, 8), k=150):
        match operation:
            case "admit":
                prompt = [random.randint(1, 2) for _ in range(random.randint(1, 10))]
                salt = random.choice(["", "", "a"])
                machine.admit(prompt, random.randint(1, 30), random.randint(1, 3), salt)
            case "ship":
                machine.ship(random.randrange(6), random.choice([0, 4, 40]), random.random() < 0.8)
            case "change":
                machine.change(random.randrange(6), random.randint(1, 3), random.randint(0, 5))
            case "cancel":
                machine.cancel(random.randrange(6))
            case "run":
                machine.run(random.randint(1, 6), random.randint(1, 4), random.random() < 0.5)
        machine.is_sound()
    machine.teardown()
    return machine.scheduler.num_preemptions
