"""Which pages simulated sequences have: `decode_worker.pages` by the count."""

from __future__ import annotations

from colm_serve.simulate.page_counts import Holding, PageCounts
from colm_serve.simulate.sequence import VirtualSequence


class CountedSequencePages:
    """Gives pages to sequences, a first lot and then one by one, and takes them back."""

    def __init__(self, num_pages: int, page_size: int, expected_output_tokens: int) -> None:
        self.counts = PageCounts(num_pages, page_size)
        self.num_growing = 0  # those with pages that may come to need more
        self._expected_output_tokens = expected_output_tokens

    def fits(self, sequence: VirtualSequence) -> bool:
        """Whether it could be served if it were alone."""
        return self.counts.pages_for(sequence.max_length) <= self.counts.num_pages

    def reserve(self, sequence: VirtualSequence) -> bool:
        """Give it its first pages, but none that those with pages may need next."""
        num_tokens = min(sequence.num_tokens + self._expected_output_tokens, sequence.max_length)
        taken = self.counts.take(
            sequence.blocks,
            sequence.num_prefill,
            self.counts.pages_for(num_tokens),
            self.num_growing,
        )
        if taken is None:
            return False
        sequence.holding, sequence.num_computed = taken
        self._count(sequence)
        return True

    def lacks_slot(self, sequence: VirtualSequence) -> bool:
        """Whether its last token has no place, so that no step can be taken."""
        return self.counts.pages_for(sequence.num_tokens) > sequence.holding.num_pages

    def grow(self, sequence: VirtualSequence) -> bool:
        """Make a place for its last token; False: there is no free page."""
        num_pages = self.counts.pages_for(sequence.num_tokens) - sequence.holding.num_pages
        if not self.counts.grow(sequence.holding, num_pages):
            return False
        self._count(sequence)
        return True

    def publish(self, sequence: VirtualSequence) -> None:
        """Let later sequences find the blocks whose K and V are complete."""
        self.counts.publish(sequence.holding, sequence.blocks, sequence.num_computed)

    def release(self, sequence: VirtualSequence) -> None:
        self.counts.release(sequence.holding)
        sequence.holding = Holding()
        sequence.num_computed = 0
        self._count(sequence)

    def check_integrity(self, num_sequences: int) -> None:
        """Raise AssertionError unless the counts agree with this number of sequences."""
        self.counts.check_integrity()
        if num_sequences == 0:
            assert self.counts.num_free == self.counts.num_pages, "pages were lost"
            assert self.num_growing == 0, "one that is gone is expected to grow"

    def _count(self, sequence: VirtualSequence) -> None:
        num_pages = sequence.holding.num_pages
        is_growing = 0 < num_pages < self.counts.pages_for(sequence.max_length)
        self.num_growing += is_growing - sequence.is_growing
        sequence.is_growing = is_growing
