"""The running sequences of a simulated decode worker, and which of them the next steps have.

As long as all of them fit into a step and have their pages, every one advances with every step, and
steps are taken many at a time. Otherwise they take turns, and each step is looked at by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from colm_serve.core import StepCost
from colm_serve.decode_worker.sequence import Stage
from colm_serve.simulate.lockstep import Lockstep, by_level
from colm_serve.simulate.sequence import VirtualSequence
from colm_serve.simulate.sequence_pages import CountedSequencePages

#: Gives these rows a page each, preempting others if need be; some may go without.
MakeRoom = Callable[[list[VirtualSequence]], None]


class Rows:
    """Sequences that make tokens, at most `max_rows` of them in a step."""

    def __init__(self, cost: StepCost, max_rows: int, pages: CountedSequencePages) -> None:
        self.running: OrderedDict[VirtualSequence, None] = OrderedDict()  # in turn
        self._num_levels = len(cost.chain_s)
        self.num_by_level = [0] * self._num_levels
        self._num_tokens_per_chain = [0] * self._num_levels
        self._cost = cost
        self._max_rows = max_rows
        self._pages = pages
        self._lockstep: Lockstep | None = self._new_lockstep()
        self._joining: list[VirtualSequence] = []
        self._lacking: list[VirtualSequence] = []  # have filled their pages
        self._chosen: list[VirtualSequence] = []  # where they take turns
        self._untold: list[VirtualSequence] = []  # have no first token yet

    @property
    def num_tokens_by_level(self) -> list[int]:
        """Tokens made, level 1 first."""
        return by_level(self._num_tokens_per_chain)

    def add(self, sequence: VirtualSequence) -> None:
        """It runs, from the next step on that is chosen."""
        self.running[sequence] = None
        self.num_by_level[sequence.level - 1] += 1
        self._joining.append(sequence)
        if sequence.first_token_at is None:
            self._untold.append(sequence)

    def remove(self, sequence: VirtualSequence) -> None:
        """It does not run any more, if it did."""
        if sequence in self.running:
            del self.running[sequence]
            if sequence in self._joining:
                self._joining.remove(sequence)
            self.num_by_level[sequence.level - 1] -= 1
            if sequence.is_in_lockstep and self._lockstep is not None:
                self._lockstep.leave(sequence)

    def move(self, sequence: VirtualSequence, level: int) -> None:
        """Make its tokens at this level from the next step on; between two steps."""
        if sequence in self.running:
            self.num_by_level[sequence.level - 1] -= 1
            self.num_by_level[level - 1] += 1
        if sequence.is_in_lockstep and self._lockstep is not None:
            self._lockstep.move(sequence, level)
        else:
            sequence.set_level(level)

    def is_in_step(self, sequence: VirtualSequence) -> bool:
        """Whether the step chosen last has it."""
        return sequence.is_in_lockstep or sequence in self._chosen

    def choose(self, make_room: MakeRoom, *, may_be_empty: bool) -> int:
        """Choose the rows of the next step, among others if these would be none; how many."""
        if self._step_together(make_room):
            return len(self.running)
        self._take_turns(make_room, may_be_empty)
        return len(self._chosen)

    def step_s(self) -> tuple[float, float]:
        """Seconds of the step chosen, and how many more the one after it takes."""
        if self._lockstep is not None:
            return self._lockstep.step_s(self._cost)
        step = self._new_lockstep()
        for sequence in self._chosen:
            step.count(sequence, sequence.level, 1)
        return step.step_s(self._cost)[0], 0.0

    def num_steps_ahead(self) -> int:
        """Steps until the rows have to be chosen anew; there has to be one."""
        return 1 if self._lockstep is None else self._lockstep.num_steps_ahead()

    def num_attended(self, num_steps: int) -> tuple[int, ...]:
        """Tokens that all rows attend to by level, so many steps after the last ones completed."""
        if self._lockstep is None:
            counts, others = [0] * self._num_levels, list(self.running)
        else:
            counts, others = self._lockstep.attended_by_level(num_steps), self._joining
        for sequence in others:
            counts[sequence.level - 1] += sequence.num_tokens
        return tuple(counts)

    def num_new_tokens(self, sequence: VirtualSequence, num_steps: int) -> int:
        """Tokens of a row that it is not told of yet, so many steps after the last ones."""
        if self._lockstep is None or not sequence.is_in_lockstep:
            return 0
        return self._lockstep.num_steps + num_steps - sequence.at_step

    def tell_first_tokens(self, step_end: float) -> None:
        """Rows that make their first token in the step chosen know when that will be."""
        if not self._untold:
            return
        untold, self._untold = self._untold, []
        for sequence in untold:
            if self.is_in_step(sequence):
                sequence.first_token_at = step_end
                sequence.on_prompt()
            elif sequence in self.running:
                self._untold.append(sequence)

    def complete(self, num_steps: int) -> list[VirtualSequence]:
        """Steps have been taken; returns the sequences that have their last token."""
        if self._lockstep is not None:
            counts = zip(self._num_tokens_per_chain, self._lockstep.rows_per_chain, strict=True)
            self._num_tokens_per_chain = [made + num_steps * rows for made, rows in counts]
            due = [s for s in self._lockstep.advance(num_steps) if s.stage is Stage.RUNNING]
            self._lacking = [s for s in due if s.num_tokens < s.max_length]
        else:
            due, self._chosen = self._chosen, []
            for sequence in due:
                sequence.num_tokens += 1
                for chain in range(sequence.level):
                    self._num_tokens_per_chain[chain] += 1
        return [s for s in due if s.num_tokens == s.max_length and s.stage is Stage.RUNNING]

    def _new_lockstep(self) -> Lockstep:
        return Lockstep(self._num_levels, self._pages.counts.page_size)

    def _step_together(self, make_room: MakeRoom) -> bool:
        """Have all rows take part in every step, if that is possible."""
        if len(self.running) > self._max_rows:
            return self._part()
        if self._lockstep is None:
            if any(map(self._pages.lacks_slot, self.running)):
                return False
            self._lockstep = self._new_lockstep()
            self._joining = list(self.running)
        if self._lacking:
            lacking, self._lacking = self._lacking, []
            make_room(lacking)
            still = [sequence for sequence in lacking if sequence in self.running]
            if any(map(self._pages.lacks_slot, still)):
                return self._part()
            for sequence in still:
                self._lockstep.expect(sequence)
        joining, self._joining = self._joining, []
        for sequence in joining:
            self._lockstep.join(sequence)
        return True

    def _part(self) -> bool:
        """Look at each step by itself from now on."""
        if self._lockstep is not None:
            for sequence in self.running:
                if sequence.is_in_lockstep:
                    self._lockstep.leave(sequence)
        self._lockstep = None
        self._joining.clear()
        return False

    def _take_turns(self, make_room: MakeRoom, may_be_empty: bool) -> None:
        """Those that come next; rows without a place for their last token sit out."""
        self._chosen = []
        for _ in range(-(-len(self.running) // self._max_rows)):
            chosen = take_turns(self.running, self._max_rows)
            make_room([sequence for sequence in chosen if self._pages.lacks_slot(sequence)])
            self._chosen = [
                sequence
                for sequence in chosen
                if sequence in self.running and not self._pages.lacks_slot(sequence)
            ]
            if self._chosen or may_be_empty:
                return


def take_turns(queue: OrderedDict[VirtualSequence, None], num: int) -> list[VirtualSequence]:
    """The first `num` of a queue; if there are more, these come last the next time."""
    chosen = list(islice(queue, num))
    if len(queue) > num:
        for sequence in chosen:
            queue.move_to_end(sequence)
    return chosen
