"""Chain-of-Linear over weights that oneDNN has packed: the CPU's fast path; forward only.

Plain matrix products fall off a cliff between 2 and 16 rows, where decode batches live: packed
weights are read at memory speed there (3 to 4 times as fast), and are no slower at any size.

Shapes: T rows (tokens), D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_available() -> bool:
    """Whether this build of torch can pack weights; the operators are torch's own, not public."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(weight_OD: Tensor) -> Tensor:
    """[O, D] fp32 in oneDNN's own layout: the same shape, `is_mkldnn`, for these kernels only."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), None)
    return packed


def staircase_linear(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    num_rows: Sequence[int],
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    """As `kernels.staircase_linear.staircase_linear`, with weights out of `pack`."""
    num_total = x_TD.shape[0]
    if len(num_rows) == 1 and num_rows[0] == num_total:
        return _linear(x_TD, weights[0], None if biases is None else biases[0])
    widths = [weights[i].shape[0] for i in range(len(num_rows))]
    ragged = any(rows != num_total for rows in num_rows)
    y_TO = (x_TD.new_zeros if ragged else x_TD.new_empty)(num_total, sum(widths))
    column = 0
    for i, rows in enumerate(num_rows):
        if rows:
            bias = None if biases is None else biases[i]
            y_TO[:rows, column : column + widths[i]] = _linear(x_TD[:rows], weights[i], bias)
        column += widths[i]
    return y_TO


def _linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x_TD[:, : weight.shape[1]]
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
