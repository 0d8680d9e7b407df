"""Sparse attention as one Triton launch: a program per query block and head; forward only.

Key blocks are read where they lie and single columns gathered 64 at a time, each folded into a
running softmax. No GPU has timed it yet.

Shapes: T rows, S tokens with keys and values, N kv heads, Q query heads, H head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colm_serve.kernels.sparse_attention import BLOCK, SparseIndex


def attend_sparse(
    q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor, index: SparseIndex, out: Tensor | None = None
) -> Tensor:
    """As `kernels.sparse_attention.attend_sparse`, in one launch.

    Args:
        out: [T, Q, H] to write into, every element of it; default: a new tensor.
    """
    num_rows, num_heads, head_dim = q_TQH.shape
    o_TQH = torch.empty_like(q_TQH) if out is None else out
    if num_rows == 0:
        return o_TQH
    assert k_SNH.stride() == v_SNH.stride(), "keys and values lie alike"
    assert q_TQH.stride(2) == k_SNH.stride(2) == o_TQH.stride(2) == 1, "heads are contiguous"
    arrays = [torch.from_numpy(array).to(q_TQH.device) for array in index]
    _sparse_attention_kernel[(triton.cdiv(num_rows, BLOCK), num_heads)](
        q_TQH,
        k_SNH,
        v_SNH,
        o_TQH,
        *arrays,
        num_rows,
        k_SNH.shape[0],
        k_SNH.shape[1],
        head_dim,
        head_dim**-0.5,
        q_TQH.stride(0),
        q_TQH.stride(1),
        k_SNH.stride(0),
        k_SNH.stride(1),
        o_TQH.stride(0),
        o_TQH.stride(1),
        BLOCK=BLOCK,
        BLOCK_H=max(16, triton.next_power_of_2(head_dim)),
        num_warps=4,
        num_stages=2,
    )
    return o_TQH


@triton.jit
def _sparse_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    block_starts_ptr,
    key_blocks_ptr,
    column_starts_ptr,
    columns_ptr,
    num_rows,
    num_tokens,
    num_kv_heads,
    head_dim,
    scale,
    q_stride,
    q_head_stride,
    kv_stride,
    kv_head_stride,
    out_stride,
    out_head_stride,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1)
    kv_offset = (head % num_kv_heads).to(tl.int64) * kv_head_stride
    k_head_ptr, v_head_ptr = k_ptr + kv_offset, v_ptr + kv_offset
    rows = block * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < head_dim
    is_element = (rows < num_rows)[:, None] & is_dim[None, :]
    q_offsets = rows[:, None].to(tl.int64) * q_stride + head * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=is_element, other=0.0)
    positions = num_tokens - num_rows + rows

    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_H), dtype=tl.float32)
    entry = head * (tl.num_programs(0) + 1) + block
    first = tl.load(block_starts_ptr + entry)
    end = tl.load(block_starts_ptr + entry + 1)
    # Blocks ascend and a row's own is among them: the first holds a key that every row sees.
    for i in range(first, end):
        keys = tl.load(key_blocks_ptr + i) * BLOCK + tl.arange(0, BLOCK)
        is_visible = keys[None, :] <= positions[:, None]
        acc, highest, total = _fold(
            q, k_head_ptr, v_head_ptr, keys, keys < num_tokens, is_visible, kv_stride, dims, is_dim,
            scale, acc, highest, total,
        )  # fmt: skip
    first = tl.load(column_starts_ptr + entry)
    end = tl.load(column_starts_ptr + entry + 1)
    for i in range(first, end, BLOCK):
        places = i + tl.arange(0, BLOCK)
        is_key = places < end
        keys = tl.load(columns_ptr + places, mask=is_key, other=0)
        is_visible = (keys[None, :] <= positions[:, None]) & is_key[None, :]
        acc, highest, total = _fold(
            q, k_head_ptr, v_head_ptr, keys, is_key, is_visible, kv_stride, dims, is_dim,
            scale, acc, highest, total,
        )  # fmt: skip
    out_offsets = rows[:, None].to(tl.int64) * out_stride + head * out_head_stride + dims[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offsets, out, mask=is_element)


@triton.jit
def _fold(
    q, k_ptr, v_ptr, keys, is_key, is_visible, kv_stride, dims, is_dim, scale, acc, highest, total
):  # fmt: skip
    """Take some keys into the running softmax."""
    offsets = keys[:, None].to(tl.int64) * kv_stride + dims[None, :]
    is_element = is_key[:, None] & is_dim[None, :]
    k = tl.load(k_ptr + offsets, mask=is_element, other=0.0)
    v = tl.load(v_ptr + offsets, mask=is_element, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(is_visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    shrink = tl.exp(highest - new_highest)
    p = tl.exp(scores - new_highest[:, None])
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_highest, total * shrink + tl.sum(p, axis=1)
