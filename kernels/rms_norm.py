"""Per-chain RMSNorm in plain torch: the reference, and the CPU's implementation.

Shapes: T rows (tokens), D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def chain_rms_norm(
    x_TD: Tensor, weights: Sequence[Tensor], num_rows: Sequence[int], eps: float
) -> Tensor:
    """Normalise each chain's slice by its own root mean square (paper 3.2.3, Figure 4).

    Args:
        x_TD: [T, D], rows sorted by level, highest first.
        weights: chain i's gain, [d_i]; as many as there are active chains or more.
        num_rows: rows that chain i touches, non-increasing; one entry per active chain.
        eps: added to the mean square.

    Returns:
        [T, sum of d_i over the active chains] in x's dtype, reduced in fp32. What chain i
        holds at rows >= num_rows[i] is zero.
    """
    num_total = x_TD.shape[0]
    columns = []
    start = 0
    for i, rows in enumerate(num_rows):
        width = weights[i].shape[0]
        x = x_TD[:rows, start : start + width]
        mean_square = x.float().pow(2).mean(dim=-1, keepdim=True)
        y = (x * torch.rsqrt(mean_square + eps)).to(x.dtype) * weights[i]
        columns.append(y if rows == num_total else F.pad(y, (0, 0, 0, num_total - rows)))
        start += width
    return torch.cat(columns, dim=-1) if len(columns) > 1 else columns[0]
