"""What selectors choose for a head, and the index that the attention kernels read.

Shapes: Q query heads, B query blocks of a span, J key blocks of its sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from colm_serve.kernels.sparse_attention import BLOCK, SparseIndex


class HeadKeys(NamedTuple):
    """The keys that one head reads.

    Attributes:
        blocks_BJ: bool, which key blocks each query block reads.
        columns: int64 positions, ascending, that every query block reads besides.
    """

    blocks_BJ: np.ndarray
    columns: np.ndarray

    @classmethod
    def of_blocks(cls, blocks_BJ: np.ndarray) -> HeadKeys:
        return cls(blocks_BJ, np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class BlockGrid:
    """The query blocks of the span [start, stop) and the key blocks [0, stop)."""

    start: int
    stop: int

    @property
    def num_query_blocks(self) -> int:
        return -(-(self.stop - self.start) // BLOCK)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.stop // BLOCK)

    @cached_property
    def first_B(self) -> np.ndarray:
        """Position of each query block's first row."""
        return self.start + BLOCK * np.arange(self.num_query_blocks)

    @cached_property
    def last_B(self) -> np.ndarray:
        """Position of each query block's last row."""
        last_B: np.ndarray = np.minimum(self.first_B + BLOCK, self.stop) - 1
        return last_B

    @cached_property
    def causal_BJ(self) -> np.ndarray:
        """bool, key blocks that some row of the query block can see."""
        return np.arange(self.num_key_blocks) <= (self.last_B // BLOCK)[:, None]

    @cached_property
    def own_BJ(self) -> np.ndarray:
        """bool, key blocks of the query block's own positions."""
        is_from_own_BJ = np.arange(self.num_key_blocks) >= (self.first_B // BLOCK)[:, None]
        own_BJ: np.ndarray = self.causal_BJ & is_from_own_BJ
        return own_BJ

    def slash_blocks(self, offsets: np.ndarray) -> np.ndarray:
        """bool [B, J]: the blocks of the keys that stand `offsets` before a row."""
        num_query_blocks = self.num_query_blocks
        # One query block further is one key block further: only j - b counts.
        is_kept = np.zeros(self.num_key_blocks + num_query_blocks - 1, dtype=bool)
        for row in (0, BLOCK - 1):
            relative = (self.start + row - offsets) // BLOCK + num_query_blocks - 1
            is_kept[relative[(relative >= 0) & (relative < len(is_kept))]] = True
        windows = np.lib.stride_tricks.sliding_window_view(is_kept, self.num_key_blocks)
        blocks_BJ: np.ndarray = windows[::-1] & self.causal_BJ
        return blocks_BJ


def build_index(grid: BlockGrid, heads: Sequence[HeadKeys]) -> SparseIndex:
    """The index of a span; each row's own position is kept whatever was chosen."""
    block_counts, key_blocks, column_counts, columns = [], [], [], []
    for keys in heads:
        blocks_BJ = (keys.blocks_BJ & grid.causal_BJ) | grid.own_BJ
        is_visible_BX = keys.columns <= grid.last_B[:, None]
        is_visible_BX &= ~blocks_BJ[:, keys.columns // BLOCK]
        block_counts.append(blocks_BJ.sum(axis=1))
        key_blocks.append(np.nonzero(blocks_BJ)[1])
        column_counts.append(is_visible_BX.sum(axis=1))
        columns.append(keys.columns[np.nonzero(is_visible_BX)[1]])
    return SparseIndex(
        _entry_starts(block_counts),
        np.concatenate(key_blocks).astype(np.int32),
        _entry_starts(column_counts),
        np.concatenate(columns).astype(np.int32),
    )


def _entry_starts(counts: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [Q, B + 1] of entries laid one after the other."""
    counts_QB = np.stack(counts).astype(np.int64)
    ends_QB = counts_QB.cumsum().reshape(counts_QB.shape)
    return np.concatenate([ends_QB[:, :1] - counts_QB[:, :1], ends_QB], axis=1)
