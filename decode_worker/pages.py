"""Which pages a sequence has: those of its prefix that are cached, and fresh ones."""

from __future__ import annotations

from collections.abc import Iterator

from colm_serve.decode_worker.sequence import Sequence
from colm_serve.kv.ledger import PageLedger
from colm_serve.kv.prefix_cache import PrefixCache


class SequencePages:
    """Gives pages to sequences and takes them back; what was computed can be found again.

    Blocks are shared between sequences of the same `cache_salt` only.
    """

    def __init__(self, ledger: PageLedger, page_size: int, cache_root: bytes) -> None:
        self._ledger = ledger
        self._page_size = page_size
        self._cache = PrefixCache(ledger, page_size, cache_root)

    def num_pages(self, num_tokens: int) -> int:
        return self._cache.num_pages(num_tokens)

    def num_slots(self, sequence: Sequence) -> int:
        """Tokens that the sequence's pages have room for."""
        return len(sequence.pages) * self._page_size

    def reserve(self, sequence: Sequence, num_tokens: int, num_spare: int) -> None:
        """Give a sequence that has no pages those of `num_tokens`; what is cached is computed.

        Raises:
            ResourceExhausted: they are not free, or `num_spare` others would not stay free; the
                sequence has no pages.
        """
        num_findable = 0 if sequence.is_scoring else sequence.num_prefill
        digests = self._digests(sequence, num_findable)
        num_pages = self.num_pages(num_tokens)
        sequence.pages, sequence.num_computed = self._cache.take(digests, num_pages, num_spare)

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
        self._cache.publish(sequence.pages, self._digests(sequence, sequence.num_computed))

    def withdraw(self, sequence: Sequence) -> None:
        """Let nobody else find the sequence's blocks: what they hold is not to be trusted."""
        self._ledger.withdraw(sequence.pages)

    def release(self, sequence: Sequence) -> None:
        self._ledger.release(sequence.pages)
        sequence.pages = ()
        sequence.num_computed = 0

    def _digests(self, sequence: Sequence, num_tokens: int) -> Iterator[bytes]:
        salt, known = sequence.request.cache_salt, sequence.block_digests
        return self._cache.digests(sequence.tokens, num_tokens, salt, known)
