"""A page pool by the count: how many pages are free, held or cached, but not which.

As `kv.ledger` and `kv.prefix_cache`, but prefixes are found by the blocks of the trace, so that a
prompt costs a few steps where the real ones look at each page. While a block is held, all that is
cached of it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from colm_serve.simulate.trace import Block


@dataclass(eq=False, slots=True)
class _Cached:
    """The first `num_pages` pages of a block; held by some, or idle and evictable."""

    block_id: int
    num_pages: int = 0
    num_holders: int = 0


@dataclass(eq=False, slots=True)
class Holding:
    """Pages of one sequence: `num_pages` in all, of which `num_own` are in no cached block."""

    num_pages: int = 0
    num_own: int = 0
    shared: list[_Cached] = field(default_factory=list)


class PageCounts:
    """Allocation, sharing and prefix look-up of `num_pages` pages of `page_size` tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._num_uncached = num_pages
        self._num_idle = 0
        self._cached: dict[int, _Cached] = {}
        self._idle: OrderedDict[_Cached, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that could be had now, idle ones included."""
        return self._num_uncached + self._num_idle

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def take(
        self, blocks: Sequence[Block], num_findable: int, num_pages: int, num_spare: int = 0
    ) -> tuple[Holding, int] | None:
        """The cached pages of the longest prefix and fresh ones.

        Args:
            num_findable: the tokens from the first on that may be found.
            num_spare: pages that have to stay free beside.

        Returns:
            The pages and how many tokens the cached ones have; None if there are too few.
        """
        holding = Holding()
        start = stop = num_held = 0
        for block_id, num_tokens in blocks:
            stop += num_tokens
            num_wanted = min(stop, num_findable) // self.page_size - start // self.page_size
            start = stop
            if num_wanted <= 0:
                continue
            entry = self._cached.get(block_id)
            if entry is None:
                break
            self._hold(entry, holding)
            num_held += min(num_wanted, entry.num_pages)
            if entry.num_pages < num_wanted:
                break
        num_new = num_pages - num_held
        if num_new + num_spare > self.num_free:
            self.release(holding)
            return None
        self._allocate(num_new)
        holding.num_pages, holding.num_own = num_pages, num_new
        return holding, num_held * self.page_size

    def grow(self, holding: Holding, num_pages: int) -> bool:
        """Take more pages; False, and none taken: they are not free."""
        if num_pages > self.num_free:
            return False
        self._allocate(num_pages)
        holding.num_pages += num_pages
        holding.num_own += num_pages
        return True

    def publish(self, holding: Holding, blocks: Sequence[Block], num_tokens: int) -> None:
        """Let later sequences find what the first `num_tokens` of these blocks have complete."""
        stop = num_before = 0
        for block_id, num_in_block in blocks:
            if stop >= num_tokens:
                break
            stop += num_in_block
            num_pages = (stop if stop < num_tokens else num_tokens) // self.page_size
            num_complete = num_pages - num_before
            num_before = num_pages
            if num_complete <= 0:
                continue
            entry = self._cached.get(block_id)
            if entry is None:
                entry = self._cached[block_id] = _Cached(block_id)
            num_added = num_complete - entry.num_pages
            if num_added > 0:
                if entry not in holding.shared:
                    self._hold(entry, holding)
                entry.num_pages += num_added
                holding.num_own -= num_added

    def release(self, holding: Holding) -> None:
        """Let go of all pages; cached ones that nobody holds any more become idle."""
        # Last block first: a prefix's tail is evicted before its head, which others may share.
        for entry in reversed(holding.shared):
            entry.num_holders -= 1
            if entry.num_holders == 0:
                self._idle[entry] = None
                self._num_idle += entry.num_pages
        self._num_uncached += holding.num_own
        holding.shared = []
        holding.num_pages = holding.num_own = 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless no count is off."""
        entries = self._cached.values()
        assert all(entry.num_pages > 0 for entry in entries), "a block of no pages is cached"
        idle = [entry for entry in entries if entry.num_holders == 0]
        assert set(idle) == set(self._idle), "idle blocks differ"
        assert sum(entry.num_pages for entry in idle) == self._num_idle, "idle pages are off"
        num_cached = sum(entry.num_pages for entry in entries)
        assert 0 <= self._num_uncached <= self.num_pages - num_cached, "pages were lost"

    def _hold(self, entry: _Cached, holding: Holding) -> None:
        if entry.num_holders == 0 and entry in self._idle:
            del self._idle[entry]
            self._num_idle -= entry.num_pages
        entry.num_holders += 1
        holding.shared.append(entry)

    def _allocate(self, num_pages: int) -> None:
        while self._num_uncached < num_pages:
            entry = next(iter(self._idle))
            num_evicted = min(entry.num_pages, num_pages - self._num_uncached)
            entry.num_pages -= num_evicted
            self._num_idle -= num_evicted
            self._num_uncached += num_evicted
            if entry.num_pages == 0:
                del self._idle[entry], self._cached[entry.block_id]
        self._num_uncached -= num_pages
