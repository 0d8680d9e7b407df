"""Per-chain RMSNorm as one Triton launch (paper 3.2.3); forward only.

One program a row and chain: a chain's slice fits one block, and no chain waits for another.

Shapes: T rows (tokens), D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from colm_serve.kernels.device_tables import int_table, pointers


def chain_rms_norm(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    num_rows: Sequence[int],
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """As `kernels.rms_norm.chain_rms_norm`, in one launch.

    Args:
        out: [T, sum of d_i] to write into, every element of it; default: a new tensor.
    """
    num_chains = len(num_rows)
    widths = tuple(w.shape[0] for w in weights[:num_chains])
    starts = tuple(accumulate(widths[:-1], initial=0))
    y_TD = x_TD.new_empty(x_TD.shape[0], sum(widths)) if out is None else out
    if x_TD.shape[0] == 0:
        return y_TD
    assert x_TD.stride(1) == y_TD.stride(1) == 1, "rows are contiguous"
    assert x_TD.shape[1] >= sum(widths), f"{x_TD.shape[1]} columns, gains for {sum(widths)}"
    block = triton.next_power_of_2(max(widths))
    device = x_TD.device
    _rms_norm_kernel[(x_TD.shape[0], num_chains)](
        x_TD,
        y_TD,
        pointers(weights[:num_chains], x_TD),
        int_table(starts, device),
        int_table(widths, device),
        int_table(tuple(num_rows), device),
        x_TD.stride(0),
        y_TD.stride(0),
        eps,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return y_TD


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptrs,
    starts_ptr,
    widths_ptr,
    num_rows_ptr,
    x_stride,
    y_stride,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    chain = tl.program_id(1)
    start = tl.load(starts_ptr + chain)
    width = tl.load(widths_ptr + chain)
    element = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    out = y_ptr + row.to(tl.int64) * y_stride + start + columns
    if row < tl.load(num_rows_ptr + chain):
        weight_ptr = tl.load(weight_ptrs + chain).to(tl.pointer_type(element))
        x_row = x_ptr + row.to(tl.int64) * x_stride + start
        x = tl.load(x_row + columns, mask=is_column, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0)
        y = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        tl.store(out, y.to(element) * weight, mask=is_column)
    else:
        tl.store(out, tl.zeros((BLOCK,), dtype=element), mask=is_column)
