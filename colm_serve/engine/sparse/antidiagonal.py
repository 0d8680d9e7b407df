"""Blocks chosen by what their antidiagonals score: no pattern file, a budget that adapts.

XAttention's idea: the sum along a tile's antidiagonal meets every column and every second slash
that crosses the tile (of neighbouring slashes, one), at one in `STRIDE` of the scores' products.

Shapes: T rows of a span, S tokens with keys, H head dim, B query blocks, J key blocks, G and K
groups of `STRIDE` rows and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_serve.engine.sparse.head_keys import BlockGrid, HeadKeys
from colm_serve.kernels.sparse_attention import BLOCK

#: On the bundled model 32 keeps as much mass per key read as 8 and 16 do.
STRIDE = 32


@dataclass(frozen=True)
class Antidiagonal:
    """The fewest key blocks whose estimated attention mass is at least `gamma`; 1 keeps all."""

    gamma: float

    def select(self, q_TH: Tensor, k_SH: Tensor, grid: BlockGrid) -> HeadKeys:
        if self.gamma >= 1:
            return HeadKeys.of_blocks(grid.causal_BJ)
        mass_BJ = block_mass(q_TH, k_SH, grid)
        largest_BJ, order_BJ = mass_BJ.sort(dim=1, descending=True)
        # A block is kept while those before it do not suffice.
        is_kept_BJ = largest_BJ.cumsum(dim=1) - largest_BJ < self.gamma
        blocks_BJ = torch.zeros_like(is_kept_BJ).scatter_(1, order_BJ, is_kept_BJ)
        return HeadKeys.of_blocks(blocks_BJ.cpu().numpy())


def block_mass(q_TH: Tensor, k_SH: Tensor, grid: BlockGrid) -> Tensor:
    """Estimated share of each query block's attention in each key block, [B, J] fp32."""
    q_GRH = _groups(q_TH, grid.num_query_blocks)
    k_KRH = _groups(k_SH, grid.num_key_blocks)
    # Row i of a group of queries meets key STRIDE - 1 - i of a group of keys.
    scores_GK = (q_GRH.flip(1).flatten(1) @ k_KRH.flatten(1).T).float()
    scores_GK *= (STRIDE * q_TH.shape[1] ** 0.5) ** -1
    first_keys_K = STRIDE * torch.arange(len(k_KRH), device=q_TH.device)
    first_rows_G = STRIDE * torch.arange(len(q_GRH), device=q_TH.device)
    last_rows_G = (grid.start + first_rows_G + STRIDE - 1).clamp(max=grid.stop - 1)
    scores_GK.masked_fill_(first_keys_K > last_rows_G[:, None], float("-inf"))
    mass_GK = F.softmax(scores_GK, dim=1)
    mass_GK[first_rows_G >= len(q_TH)] = 0
    per_block = BLOCK // STRIDE
    mass_BJ = mass_GK.view(-1, per_block, grid.num_key_blocks, per_block).sum(dim=(1, 3))
    shares_BJ: Tensor = mass_BJ / mass_BJ.sum(dim=1, keepdim=True)
    return shares_BJ


def _groups(x_TH: Tensor, num_blocks: int) -> Tensor:
    """[groups, STRIDE, H]; zeros complete the last block."""
    num_missing = num_blocks * BLOCK - len(x_TH)
    if num_missing:
        x_TH = F.pad(x_TH, (0, 0, 0, num_missing))
    groups: Tensor = x_TH.contiguous().unflatten(0, (-1, STRIDE))
    return groups
