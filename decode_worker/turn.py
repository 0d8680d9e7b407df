"""What a decode worker computes next, and what came of it: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from colm_serve.core import FinishReason
from colm_serve.decode_worker.sequence import Sequence


class Row(NamedTuple):
    """A running sequence's last token and `num_drafts` drafted ones behind it, all scored."""

    sequence: Sequence
    level: int
    num_drafts: int

    @property
    def num_tokens(self) -> int:
        return 1 + self.num_drafts

    @property
    def num_scored(self) -> int:
        return self.num_tokens


class Chunk(NamedTuple):
    """The next `num_tokens` tokens that a sequence lacks K and V of, to be computed here."""

    sequence: Sequence
    num_tokens: int
    level: int = 1
    num_scored: int = 0


@dataclass(frozen=True)
class Turn:
    """One pass over `slices`, highest level first, at a level those that are scored first.

    The tokens of a slice start at its sequence's `num_computed`. `readmitted` sequences have
    pages again, which lack K and V; `preempted` ones have lost theirs.
    """

    slices: tuple[Row | Chunk, ...]
    readmitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()


class Outcome(NamedTuple):
    """The tokens that a row's sequence has now more, and why its text ended, if it did."""

    tokens: tuple[int, ...]
    reason: FinishReason | None
