"""Chain-of-Linear as one Triton launch (paper A.6.1, Figure 8); forward only.

A GEMM whose K bound depends on the output tile: a tile of chain i sums over the inputs of chains
1..i and over no others, which is the block-sparse product of the paper without storing blocks.
Tiles with the longest K start first, so that the short ones fill the last wave. A tile beyond
its chain's rows writes zeros and ends at once.

Block sizes follow from Hopper's shared memory and registers; no GPU has timed them yet. Left for
when one does: tuned sizes, row tiles grouped so that long prompts reuse x from L2, a persistent
loop, and the fallback of one cuBLAS call a chain where that is faster.

Shapes: T rows (tokens), D input width, O output width; M, N, K the tile's rows, columns, inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from colm_serve.kernels.device_tables import int_table, pointers


@dataclass(frozen=True)
class _Blocks:
    """A tile's size and how it is run."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


_DECODE = _Blocks(m=16, n=64, k=128, num_warps=4, num_stages=4)
_PREFILL = _Blocks(m=128, n=128, k=64, num_warps=8, num_stages=3)
_PREFILL_FP32 = _Blocks(m=64, n=64, k=32, num_warps=4, num_stages=2)


def staircase_linear(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    num_rows: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `kernels.staircase_linear.staircase_linear`, in one launch.

    Args:
        out: [T, O] to write into, every element of it; default: a new tensor.
    """
    num_chains = len(num_rows)
    shapes = tuple((w.shape[0], w.shape[1]) for w in weights[:num_chains])
    num_total, num_columns = x_TD.shape[0], sum(width for width, _ in shapes)
    y_TO = x_TD.new_empty(num_total, num_columns) if out is None else out
    if num_total == 0:
        return y_TO
    assert x_TD.stride(1) == y_TO.stride(1) == 1, "rows are contiguous"
    longest = max(k for _, k in shapes)
    assert x_TD.shape[1] >= longest, f"{x_TD.shape[1]} columns, weights read {longest}"
    assert num_total >= num_rows[0], f"{num_total} rows, chain 1 touches {num_rows[0]}"
    blocks = _choose_blocks(num_total, x_TD.dtype)
    tiles = _tiles(shapes, blocks.n)
    num_row_tiles = triton.cdiv(num_total, blocks.m)
    device = x_TD.device
    _staircase_kernel[(num_row_tiles * len(tiles),)](
        x_TD,
        y_TO,
        pointers(weights[:num_chains], x_TD),
        pointers((weights if biases is None else biases)[:num_chains], x_TD),
        int_table(tuple(number for tile in tiles for number in tile), device),
        int_table(tuple(num_rows), device),
        num_total,
        x_TD.stride(0),
        y_TO.stride(0),
        num_row_tiles,
        HAS_BIAS=biases is not None,
        IS_ALIGNED=_is_aligned(weights[:num_chains]),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return y_TO


def _is_aligned(weights: Sequence[Tensor]) -> bool:
    """Whether every row of every weight may be loaded in words of 16 bytes."""
    return all(w.data_ptr() % 16 == 0 and w.shape[1] % 16 == 0 for w in weights)


def _choose_blocks(num_rows: int, dtype: torch.dtype) -> _Blocks:
    if num_rows <= 32:
        return _DECODE
    return _PREFILL_FP32 if dtype == torch.float32 else _PREFILL


@lru_cache(maxsize=1024)
def _tiles(shapes: tuple[tuple[int, int], ...], block_n: int) -> tuple[tuple[int, ...], ...]:
    """(chain, first column in the chain, width, K, chain's column in y) of each column tile."""
    starts = accumulate((width for width, _ in shapes), initial=0)
    tiles = [
        (chain, first, width, k, start)
        for chain, ((width, k), start) in enumerate(zip(shapes, starts, strict=False))
        for first in range(0, width, block_n)
    ]
    return tuple(sorted(tiles, key=lambda tile: -tile[3]))


@triton.jit
def _staircase_kernel(
    x_ptr,
    y_ptr,
    weight_ptrs,
    bias_ptrs,
    tiles_ptr,
    num_rows_ptr,
    num_total,
    x_stride,
    y_stride,
    num_row_tiles,
    HAS_BIAS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    # Neighbouring programs share a column tile: its weights stay in the cache.
    tile_ptr = tiles_ptr + (pid // num_row_tiles) * 5
    chain = tl.load(tile_ptr)
    first = tl.load(tile_ptr + 1)
    width = tl.load(tile_ptr + 2)
    k_bound = tl.load(tile_ptr + 3)
    start = tl.load(tile_ptr + 4)
    num_rows = tl.load(num_rows_ptr + chain)
    element = x_ptr.dtype.element_ty
    weight_ptr = tl.load(weight_ptrs + chain).to(tl.pointer_type(element))

    if IS_ALIGNED:
        # Addresses out of a table carry no alignment; without it loads are neither wide nor async.
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        k_bound = tl.multiple_of(k_bound, 16)

    rows = (pid % num_row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first + tl.arange(0, BLOCK_N)
    is_row, is_column = rows < num_rows, columns < width
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if (pid % num_row_tiles) * BLOCK_M < num_rows:
        x_rows = x_ptr + rows[:, None].to(tl.int64) * x_stride
        weight_rows = weight_ptr + columns[None, :].to(tl.int64) * k_bound
        for k_start in range(0, k_bound, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            is_k = k < k_bound
            x = tl.load(x_rows + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            w = tl.load(
                weight_rows + k[:, None], mask=is_k[:, None] & is_column[None, :], other=0.0
            )
            acc = tl.dot(x, w, acc, input_precision="ieee")
        if HAS_BIAS:
            bias_ptr = tl.load(bias_ptrs + chain).to(tl.pointer_type(element))
            bias = tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
            acc = tl.where(is_row[:, None], acc + bias[None, :], 0.0)
    out = y_ptr + rows[:, None].to(tl.int64) * y_stride + (start + columns)[None, :]
    tl.store(out, acc.to(element), mask=(rows < num_total)[:, None] & is_column[None, :])
