"""Attention to chosen keys only: the index that says which, and the plain torch reference.

Shapes: T rows, S tokens with keys and values, N kv heads, Q query heads, H head dim, B query
blocks of the T rows, X keys that a query block reads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows of a query block, and positions of a key block.
BLOCK = 64


class SparseIndex(NamedTuple):
    """Which keys each block of 64 query rows attends to, by query head; causality always applies.

    Query block b is rows [64 b, 64 b + 64) of a span, wherever in its sequence the span begins.
    Every row's own position has to be among its block's keys.

    Attributes:
        block_starts: int64 [Q, B + 1]; head h's block b reads the entries
            [block_starts[h, b], block_starts[h, b + 1]) of `key_blocks`.
        key_blocks: int32, ascending within an entry; block j is positions [64 j, 64 j + 64).
        column_starts: int64 [Q, B + 1], the same for `columns`.
        columns: int32 positions, ascending within an entry, none in one of the entry's blocks.
    """

    block_starts: np.ndarray
    key_blocks: np.ndarray
    column_starts: np.ndarray
    columns: np.ndarray

    def keys(self, head: int, block: int, num_tokens: int) -> np.ndarray:
        """int64 positions below `num_tokens` that a query block reads, causality aside."""
        first, end = self.block_starts[head, block : block + 2]
        key_blocks = self.key_blocks[first:end].astype(np.int64)
        first, end = self.column_starts[head, block : block + 2]
        positions = (key_blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        return np.concatenate([positions[positions < num_tokens], self.columns[first:end]])


def attend_sparse(q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor, index: SparseIndex) -> Tensor:
    """As `kernels.paged_attention.attend`, each query block reading its keys of `index` alone.

    Args:
        q_TQH: [T, Q, H], rotated; the last T of S tokens.
        k_SNH: [S, N, H], rotated.
        v_SNH: [S, N, H].

    Returns:
        [T, Q, H].
    """
    num_tokens, num_kv_heads = k_SNH.shape[:2]
    positions_T = torch.arange(num_tokens - q_TQH.shape[0], num_tokens, device=q_TQH.device)
    o_TQH = torch.empty_like(q_TQH)
    for head in range(q_TQH.shape[1]):
        k_SH, v_SH = k_SNH[:, head % num_kv_heads], v_SNH[:, head % num_kv_heads]
        for block, first in enumerate(range(0, q_TQH.shape[0], BLOCK)):
            rows = slice(first, first + BLOCK)
            keys_X = torch.from_numpy(index.keys(head, block, num_tokens)).to(q_TQH.device)
            mask_TX = keys_X <= positions_T[rows, None]
            o_TQH[rows, head] = F.scaled_dot_product_attention(
                q_TQH[None, rows, head], k_SH[None, keys_X], v_SH[None, keys_X], attn_mask=mask_TX
            )[0]
    return o_TQH
