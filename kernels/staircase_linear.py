"""Chain-of-Linear in plain torch: the reference, and the CPU's implementation; forward only.

Shapes: T rows (tokens), D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def staircase_linear(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    num_rows: Sequence[int],
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    """y_i = W_i x_{<=i} + b_i for each chain i (paper 3.1, equation 1 and Algorithm 1).

    Args:
        x_TD: [T, D] with T >= num_rows[0] and D >= the widest active weight; rows sorted by
            level, highest first.
        weights: chain i's weight, [out_i, in_{<=i}]; as many as there are active chains or more.
        num_rows: rows that chain i touches, non-increasing; one entry per active chain.
        biases: chain i's bias, [out_i], or None.

    Returns:
        [T, sum of out_i over the active chains]. What chain i holds at rows >= num_rows[i]
        is zero.
    """
    num_total = x_TD.shape[0]
    widths = [weights[i].shape[0] for i in range(len(num_rows))]
    # Slices of one output instead of torch.cat: the copy costs up to 15% of a prefill.
    ragged = any(rows != num_total for rows in num_rows)
    y_TO = (x_TD.new_zeros if ragged else x_TD.new_empty)(num_total, sum(widths))
    column = 0
    for i, rows in enumerate(num_rows):
        weight = weights[i]
        out = y_TO[:rows, column : column + widths[i]]
        x = x_TD[:rows, : weight.shape[1]]
        if biases is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(biases[i], x, weight.t(), out=out)
        column += widths[i]
    return y_TO
