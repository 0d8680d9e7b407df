"""Which pages a sequence has: those of its prefix that are cached, and fresh ones."""

from __future__ import annotations

from colm_serve.decode_worker.sequence import Sequence
from colm_serve.errors import ResourceExhausted
from colm_serve.kv.ledger import PageLedger, block_digests


class SequencePages:
    """Gives pages to sequences and takes them back; what was computed can be found again.

    Blocks are shared between sequences of the same `cache_salt` only.
    """

    def __init__(self, ledger: PageLedger, page_size: int, cache_root: bytes) -> None:
        self._ledger = ledger
        self._page_size = page_size
        self._cache_root = cache_root

    def num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def num_slots(self, sequence: Sequence) -> int:
        """Tokens that the sequence's pages have room for."""
        return len(sequence.pages) * self._page_size

    def reserve(self, sequence: Sequence, num_tokens: int, num_spare: int) -> None:
        """Give a sequence that has no pages those of `num_tokens`; what is cached is computed.

        Raises:
            ResourceExhausted: they are not free, or `num_spare` others would not stay free; the
                sequence has no pages.
        """
        cached: list[int] = []
        if not sequence.is_scoring:
            cached = self._ledger.hold_prefix(self._digests(sequence, sequence.num_prefill))
        num_new = self.num_pages(num_tokens) - len(cached)
        num_free = self._ledger.num_free
        if num_new + num_spare > num_free:
            self._ledger.release(cached)
            kept = f", {num_spare} of them for requests that run" if num_spare else ""
            raise ResourceExhausted(
                f"{num_new} KV pages wanted, {num_free} of {self._ledger.num_pages} free{kept}"
            )
        sequence.pages = (*cached, *self._ledger.allocate(num_new))
        sequence.num_computed = len(cached) * self._page_size

    def num_lacking(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that the sequence has to take before it has slots for this many tokens."""
        return max(0, self.num_pages(num_tokens) - len(sequence.pages))

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take the pages lacking for this many tokens; False, and none taken: they are not free."""
        num_pages = self.num_lacking(sequence, num_tokens)
        if num_pages > self._ledger.num_free:
            return False
        sequence.pages += tuple(self._ledger.allocate(num_pages))
        return True

    def publish(self, sequence: Sequence) -> None:
        """Let later sequences find the blocks whose K and V are complete."""
        digests = self._digests(sequence, sequence.num_computed)
        for page, digest in zip(sequence.pages, digests, strict=False):
            self._ledger.publish(page, digest)

    def release(self, sequence: Sequence) -> None:
        self._ledger.release(sequence.pages)
        sequence.pages = ()
        sequence.num_computed = 0

    def _digests(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Of the full blocks among the first `num_tokens`; each is made once."""
        known, size = sequence.block_digests, self._page_size
        num_blocks = num_tokens // size
        parent = known[-1] if known else self._root(sequence.request.cache_salt)
        known += block_digests(sequence.tokens[len(known) * size : num_blocks * size], size, parent)
        return known[:num_blocks]

    def _root(self, cache_salt: str) -> bytes:
        return self._cache_root + cache_salt.encode()
