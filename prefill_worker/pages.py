"""Which pages a job has: those of its prompt's cached prefix, and fresh ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from colm_serve.errors import ResourceExhausted
from colm_serve.kv.ledger import PageLedger
from colm_serve.kv.prefix_cache import PrefixCache
from colm_serve.prefill_worker.job import PrefillJob


class JobPages(Protocol):
    """Where jobs get their pages from."""

    page_size: int

    @property
    def num_pages(self) -> int:
        """Of all jobs together, at most."""

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""

    def take(self, job: PrefillJob) -> bool:
        """Give a job pages for its prompt, and set what is cached; False: they are not free."""

    def publish(self, job: PrefillJob, num_new: int) -> None:
        """Let later prompts find the blocks that its last `num_new` tokens have completed."""

    def release(self, job: PrefillJob) -> None:
        """Let go of the job's pages."""

    def check_integrity(self, jobs: Iterable[PrefillJob]) -> None:
        """Raise AssertionError unless these jobs have all the pages that are not free."""


class LedgerPages:
    """The pages of a ledger; prefixes are found by the digests of their blocks."""

    def __init__(self, ledger: PageLedger, page_size: int, cache_root: bytes) -> None:
        self.page_size = page_size
        self._ledger = ledger
        self._cache = PrefixCache(ledger, page_size, cache_root)

    @property
    def num_pages(self) -> int:
        return self._ledger.num_pages

    def pages_for(self, num_tokens: int) -> int:
        return self._cache.num_pages(num_tokens)

    def take(self, job: PrefillJob) -> bool:
        digests = self._digests(job, job.num_tokens)
        try:
            job.pages, job.num_cached = self._cache.take(digests, self.pages_for(job.num_tokens))
        except ResourceExhausted:
            return False
        return True

    def publish(self, job: PrefillJob, num_new: int) -> None:
        first_block = (job.num_computed - num_new) // self.page_size
        digests = self._digests(job, job.num_computed, first_block)
        self._cache.publish(job.pages[first_block:], digests)

    def withdraw(self, job: PrefillJob) -> None:
        """Let no later prompt find the job's blocks: something in them is no number."""
        self._ledger.withdraw(job.pages)

    def release(self, job: PrefillJob) -> None:
        self._ledger.release(job.pages)
        job.pages = ()

    def check_integrity(self, jobs: Iterable[PrefillJob]) -> None:
        self._ledger.check_integrity()
        held = {page for job in jobs for page in job.pages}
        assert len(held) + self._ledger.num_free == self._ledger.num_pages, "pages were lost"

    def _digests(self, job: PrefillJob, num_tokens: int, first_block: int = 0) -> Iterator[bytes]:
        salt, known = job.request.cache_salt, job.block_digests
        return self._cache.digests(job.request.tokens, num_tokens, salt, known, first_block)
