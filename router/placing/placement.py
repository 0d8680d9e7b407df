"""The few workers that a decision looks at, out of any number of one kind. Pure.

Choosing among them costs the same for ten workers as for thousands.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from colm_serve.router.placing.prefix_index import PrefixIndex
from colm_serve.router.placing.snapshot import DecodeState, PrefillState

#: Up to so many workers of a kind, a decision looks at all of them.
MAX_ALL = 8
NUM_MATCHES = 2
NUM_LEAST_LOADED = 2
NUM_RANDOM = 1
#: Looked at before a request is refused.
NUM_ROOMIEST = 8

#: A whole number from 0 up to, but not, the one given.
Draw = Callable[[int], int]
State = TypeVar("State", DecodeState, PrefillState)


class Ranking:
    """Workers in order of a value that changes, least first; a change is a binary search."""

    def __init__(self) -> None:
        self._order: list[tuple[float, int]] = []
        self._values: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._order)

    def set(self, worker: int, value: float) -> None:
        """Enter a worker, or move it."""
        known = self._values.get(worker)
        if known == value:
            return
        if known is not None:
            del self._order[bisect_left(self._order, (known, worker))]
        self._values[worker] = value
        insort(self._order, (value, worker))

    def drop(self, worker: int) -> None:
        """Leave out a worker, if it is there."""
        value = self._values.pop(worker, None)
        if value is not None:
            del self._order[bisect_left(self._order, (value, worker))]

    def least(self, count: int) -> list[int]:
        return [worker for _, worker in self._order[:count]]

    def at(self, position: int) -> int:
        return self._order[position][1]


class WorkerGroup(Generic[State]):
    """The workers of one kind: what each is believed to have cached, and the orders to choose by.

    A worker is a number, new for every process.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._index = PrefixIndex()
        self._states: dict[int, State] = {}
        self._load: defaultdict[int | None, Ranking] = defaultdict(Ranking)  # by pace
        self._paces: dict[int, int | None] = {}
        self._fullness = Ranking()
        self._smallness = Ranking()
        self._unranked: dict[int, int] = {}  # free pages, by which few decisions choose

    def __len__(self) -> int:
        """Workers that can be chosen."""
        return len(self._states)

    def set(
        self,
        worker: int,
        state: State,
        load: float,
        num_free_pages: int,
        pace: int | None = None,
    ) -> None:
        """A worker that can be chosen, as it is now; of each `pace` the least `load` is first."""
        if worker not in self._states:
            self._index.join(worker, state.status.num_pages)
        elif self._paces[worker] != pace:
            self._load[self._paces[worker]].drop(worker)
        self._states[worker] = state
        self._paces[worker] = pace
        self._load[pace].set(worker, load)
        self._unranked[worker] = num_free_pages

    def drop(self, worker: int) -> None:
        """The worker cannot be chosen for now; what it has cached is still there."""
        self._states.pop(worker, None)
        self._unranked.pop(worker, None)
        self._paces.pop(worker, None)
        for ranking in (*self._load.values(), self._fullness, self._smallness):
            ranking.drop(worker)

    def leave(self, worker: int) -> None:
        """The process is gone."""
        self.drop(worker)
        self._index.leave(worker)

    def cached(self, worker: int, hashes: Sequence[int]) -> None:
        """The worker has these blocks of a sequence, or will have them, from the first on."""
        self._index.add(worker, hashes)

    def candidates(
        self, hashes: Sequence[int], draw: Draw, pace: int | None = None
    ) -> tuple[State, ...]:
        """The workers to choose among for a prompt of these blocks: all if they are few.

        Else those that have most of the prompt, the least loaded of the request's pace and one of
        each other, and random others, so that several routers whose news is equally old do not all
        choose the same.
        """
        if not self._states:
            return ()
        matches = self._index.matches(hashes, MAX_ALL)
        num_workers = len(self._states)
        if num_workers <= MAX_ALL:
            chosen = list(self._states)
        else:
            reachable: list[int] = [worker for worker in matches if worker in self._states]
            own: list[int] = self._load[pace].least(NUM_LEAST_LOADED)
            least: list[int] = [w for each in self._load.values() for w in each.least(1)]
            drawn: list[int] = [self._at(draw(num_workers)) for _ in range(NUM_RANDOM)]
            chosen = [*reachable[:NUM_MATCHES], *own, *least, *drawn]
        return self._states_of(chosen, matches)

    def _at(self, position: int) -> int:
        """A worker by its place among all."""
        for ranking in self._load.values():
            if position < len(ranking):
                break
            position -= len(ranking)
        return ranking.at(position)

    def roomiest(self, hashes: Sequence[int]) -> tuple[State, ...]:
        """Those with the most free pages, and the one with the most pages in all."""
        for worker, num_free_pages in self._unranked.items():
            self._fullness.set(worker, -num_free_pages)
            self._smallness.set(worker, -self._states[worker].status.num_pages)
        self._unranked.clear()
        matches = self._index.matches(hashes, MAX_ALL)
        chosen = [*self._fullness.least(NUM_ROOMIEST), *self._smallness.least(1)]
        return self._states_of(chosen, matches)

    def _states_of(self, chosen: Iterable[int], matches: dict[int, int]) -> tuple[State, ...]:
        states = []
        # A dict keeps the order, and each worker once.
        for worker in dict.fromkeys(chosen):
            state = self._states[worker]
            if worker in matches:
                state = state.for_prompt(matches[worker] * self._block_tokens)
            states.append(state)
        return tuple(states)
