"""How much of dense attention an index keeps, and how many keys it reads for that.

Shapes: T rows of a span, S tokens with keys, Q query heads, N kv heads, H head dim, I indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from colm_serve.engine.sparse.head_keys import BlockGrid
from colm_serve.kernels.sparse_attention import BLOCK, SparseIndex


def mass_kept(q_TQH: Tensor, k_SNH: Tensor, indices: Sequence[SparseIndex]) -> Tensor:
    """Share of the rows' attention that lies on the keys of each index, [I, Q], 0 to 1.

    Args:
        q_TQH: [T, Q, H], rotated; the last T of S tokens.
        k_SNH: [S, N, H], rotated; query head j reads kv head j % N (tile order).
    """
    num_rows, num_heads, head_dim = q_TQH.shape
    num_tokens, num_kv_heads = k_SNH.shape[:2]
    positions_S = torch.arange(num_tokens, device=q_TQH.device)
    kept_IQ = torch.zeros((len(indices), num_heads))
    for head in range(num_heads):
        k_SH = k_SNH[:, head % num_kv_heads].float() * head_dim**-0.5
        for block, first in enumerate(range(0, num_rows, BLOCK)):
            rows = slice(first, first + BLOCK)
            scores_TS = q_TQH[rows, head].float() @ k_SH.T
            future_TS = positions_S > positions_S[num_tokens - num_rows :][rows, None]
            mass_S = scores_TS.masked_fill_(future_TS, float("-inf")).softmax(dim=1).sum(dim=0)
            for i, index in enumerate(indices):
                keys = torch.from_numpy(index.keys(head, block, num_tokens))
                kept_IQ[i, head] += mass_S[keys.to(mass_S.device)].sum().cpu()
    return kept_IQ / num_rows


def keys_read(index: SparseIndex, grid: BlockGrid) -> np.ndarray:
    """float64 [Q]: keys that each head's query blocks read, as a share of those they could."""
    blocks = index.block_starts[:, -1] - index.block_starts[:, 0]
    columns = index.column_starts[:, -1] - index.column_starts[:, 0]
    share: np.ndarray = (blocks * BLOCK + columns) / (grid.causal_BJ.sum() * BLOCK)
    return share
