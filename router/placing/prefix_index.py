"""Which workers are believed to have a prompt's keys and values cached, from what was placed there.

An approximation: nobody reports evictions. It only ever costs or saves time, never correctness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Workers remembered for one block: as many as a decision looks at.
MAX_HOLDERS = 8
#: Blocks remembered in all; 400 to 700 bytes each, by the number of their holders.
MAX_BLOCKS = 2**17


def block_hashes(tokens: Sequence[int], block_tokens: int, salt: str) -> tuple[int, ...]:
    """A hash of each full block, chained: equal ones mean equal prefixes under the same salt.

    Python's own hash: a collision misleads one placement, and the workers look for themselves.
    """
    hashes = []
    parent = hash(salt)
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = hash((parent, tuple(tokens[start : start + block_tokens])))
        hashes.append(parent)
    return tuple(hashes)


@dataclass(slots=True)
class _Worker:
    num_pages: int
    num_added: int = 0  # blocks that were new to it when they were added


class PrefixIndex:
    """Blocks by hash, and who holds them; least recently used blocks are forgotten first.

    A worker is a number, new for every process. A block counts as evicted there once as many
    others as the worker has pages have been added after it.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        # Of each block, its holders, the latest last, with their `num_added` when it was used.
        self._blocks: OrderedDict[int, dict[int, int]] = OrderedDict()
        self._workers: dict[int, _Worker] = {}

    def __len__(self) -> int:
        """Blocks remembered."""
        return len(self._blocks)

    def join(self, worker: int, num_pages: int) -> None:
        """Remember what this worker has from now on, if it is not known."""
        self._workers.setdefault(worker, _Worker(num_pages))

    def leave(self, worker: int) -> None:
        """The process is gone; its entries are passed over from now on, and fade with time."""
        self._workers.pop(worker, None)

    def add(self, worker: int, hashes: Sequence[int]) -> None:
        """The worker computes, or has computed, these blocks of one sequence, from its first."""
        state = self._workers.get(worker)
        if state is None:
            return
        # The last block first, so that the first is forgotten last: a chain is found from there.
        blocks = self._blocks
        for block in reversed(hashes):
            if (holders := blocks.get(block)) is None:
                state.num_added += 1
                blocks[block] = {worker: state.num_added}
                continue
            blocks.move_to_end(block)
            if holders.pop(worker, None) is None:
                state.num_added += 1
                if len(holders) == MAX_HOLDERS:
                    del holders[next(iter(holders))]
            holders[worker] = state.num_added
        while len(blocks) > self._max_blocks:
            blocks.popitem(last=False)

    def matches(self, hashes: Sequence[int], limit: int) -> dict[int, int]:
        """Up to `limit` workers that have the longest prefixes, longest first, in blocks."""
        found: dict[int, int] = {}
        known = self._known(hashes)
        for depth in range(len(known), 0, -1):
            holders = known[depth - 1]
            if holders.keys() <= found.keys():
                continue
            for worker in [worker for worker in reversed(holders) if worker not in found]:
                state = self._workers.get(worker)
                if state is None or state.num_added - holders[worker] >= state.num_pages:
                    del holders[worker]
                    continue
                found[worker] = depth
                if len(found) == limit:
                    return found
        return found

    def _known(self, hashes: Iterable[int]) -> list[dict[int, int]]:
        """The holders of each block, up to the first that nobody has."""
        known = []
        for block in hashes:
            if (holders := self._blocks.get(block)) is None:
                break
            known.append(holders)
        return known
