"""Pages for token sequences: those of the longest cached prefix, shared, and fresh ones. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from colm_serve.errors import ResourceExhausted
from colm_serve.kv.ledger import PageLedger, block_digests


class PrefixCache:
    """Finds blocks by their tokens and all before them, among sequences of the same salt only."""

    def __init__(self, ledger: PageLedger, page_size: int, root: bytes) -> None:
        """`root` names the weights that the keys and values come from."""
        self._ledger = ledger
        self._page_size = page_size
        self._root = root

    def num_pages(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self._page_size)

    def digests(
        self,
        tokens: Sequence[int],
        num_tokens: int,
        salt: str,
        known: list[bytes],
        first_block: int = 0,
    ) -> Iterator[bytes]:
        """Those of the full blocks among the first `num_tokens`, made as they are asked for.

        Args:
            known: the sequence's digests made so far; it grows, so that each is made once.
            first_block: whose digest is the first to be given.
        """
        size = self._page_size
        for block in range(first_block, num_tokens // size):
            while block >= len(known):
                parent = known[-1] if known else self._root + salt.encode()
                start = len(known) * size
                known += block_digests(tokens[start : start + size], size, parent)
            yield known[block]

    def take(
        self, digests: Iterable[bytes], num_pages: int, num_spare: int = 0
    ) -> tuple[tuple[int, ...], int]:
        """Hold the cached pages of the longest prefix and fresh ones, `num_pages` in all.

        Returns:
            The pages, and how many tokens the cached ones among them have.

        Raises:
            ResourceExhausted: they are not free, or `num_spare` others would not stay free;
                nothing was taken.
        """
        cached = self._ledger.hold_prefix(digests)
        num_new = num_pages - len(cached)
        num_free = self._ledger.num_free
        if num_new + num_spare > num_free:
            self._ledger.release(cached)
            kept = f", {num_spare} of them for requests that run" if num_spare else ""
            raise ResourceExhausted(
                f"{num_new} KV pages wanted, {num_free} of {self._ledger.num_pages} free{kept}"
            )
        return (*cached, *self._ledger.allocate(num_new)), len(cached) * self._page_size

    def publish(self, pages: Sequence[int], digests: Iterable[bytes]) -> None:
        """Let later sequences find blocks whose K and V are complete."""
        for page, digest in zip(pages, digests, strict=False):
            self._ledger.publish(page, digest)
