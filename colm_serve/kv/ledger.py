"""Which KV pages are free, shared or cached: the pure book-keeping of a page pool.

A page is in exactly one state: free; held (by one or more sequences); or idle, held by nobody
but still findable by the digest of the tokens whose keys and values it has. Idle pages are
evicted, least recently used first, when free ones run out.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from colm_serve.errors import ResourceExhausted


def block_digests(tokens: Sequence[int], page_size: int, root: bytes) -> list[bytes]:
    """Digest of each full block of `tokens`, chained: equal digests mean equal prefixes.

    Args:
        tokens: token ids from the sequence's first on.
        page_size: tokens a block.
        root: names the weights (and, when given, the tenant) the keys and values come from.
    """
    digests = []
    parent = root
    for start in range(0, len(tokens) - page_size + 1, page_size):
        block = array("Q", tokens[start : start + page_size]).tobytes()
        # A cryptographic hash: a collision would serve one client another's prompt.
        parent = hashlib.blake2b(parent + block, digest_size=16).digest()
        digests.append(parent)
    return digests


class PageLedger:
    """Allocation, sharing and prefix look-up of `num_pages` pages."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._num_holders = [0] * num_pages
        self._is_free = bytearray(b"\x01" * num_pages)
        self._num_uncached = num_pages
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that an allocation could have now, idle ones included."""
        return self._num_uncached + len(self._idle)

    def allocate(self, num_pages: int) -> list[int]:
        """Hold `num_pages` fresh pages, neighbours where possible: those are read uncopied.

        Raises:
            ResourceExhausted: fewer are free; nothing was taken.
        """
        if num_pages > self.num_free:
            raise ResourceExhausted(
                f"{num_pages} KV pages wanted, {self.num_free} of {self.num_pages} free"
            )
        while self._num_uncached < num_pages:
            self._evict()
        start = self._is_free.find(b"\x01" * num_pages)
        if start >= 0:
            pages = list(range(start, start + num_pages))
        else:
            pages = [page for page, free in enumerate(self._is_free) if free][:num_pages]
        for page in pages:
            self._is_free[page] = 0
            self._num_holders[page] = 1
        self._num_uncached -= num_pages
        return pages

    def hold_prefix(self, digests: Iterable[bytes]) -> list[int]:
        """Hold the cached pages of the longest prefix of these chained digests."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._idle.pop(page, None)
            self._num_holders[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, digest: bytes) -> None:
        """Make a held page findable; the first page with a digest keeps it."""
        assert self._num_holders[page] > 0, f"page {page} is not held"
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def withdraw(self, pages: Iterable[int]) -> None:
        """Let nobody find these held pages any more; who holds them goes on."""
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is not held"
            digest = self._digest_of.pop(page, None)
            if digest is not None:
                del self._page_of[digest]

    def release(self, pages: Sequence[int]) -> None:
        """Let go of held pages; those nobody holds any more become idle or free."""
        # Last block first: a prefix's tail is evicted before its head, which others may share.
        for page in reversed(pages):
            assert self._num_holders[page] > 0, f"page {page} is not held"
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free(page)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is in exactly one state."""
        for page in range(self.num_pages):
            held, free = self._num_holders[page] > 0, bool(self._is_free[page])
            states = [held, free, page in self._idle]
            assert sum(states) == 1, f"page {page}: held, free, idle = {states}"
            assert not (free and page in self._digest_of), f"page {page}: free yet findable"
        assert self._num_uncached == sum(self._is_free), "count of free pages is off"
        assert {d: p for p, d in self._digest_of.items()} == self._page_of, "digests disagree"

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        self._free(page)

    def _free(self, page: int) -> None:
        self._is_free[page] = 1
        self._num_uncached += 1
