"""Sparse attention: all keys give dense attention, fewer give that of a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from colm_serve.kernels import sparse_attention_triton
from colm_serve.kernels.paged_attention import attend
from colm_serve.kernels.sparse_attention import BLOCK, SparseIndex, attend_sparse

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16


def make_qkv(num_rows: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q_TQH = torch.randn(num_rows, NUM_HEADS, HEAD_DIM)
    k_SNH, v_SNH = torch.randn(2, num_tokens, NUM_KV_HEADS, HEAD_DIM)
    return q_TQH, k_SNH, v_SNH


def make_index(entries: list[list[tuple[list[int], list[int]]]]) -> SparseIndex:
    """From (key blocks, columns) of each query block of each head."""
    starts: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for which in range(2):
        counts = np.array([[len(entry[which]) for entry in head] for head in entries])
        ends = counts.cumsum().reshape(counts.shape)
        starts.append(np.column_stack([ends[:, 0] - counts[:, 0], ends]).astype(np.int64))
        flat = [key for head in entries for entry in head for key in entry[which]]
        values.append(np.array(flat, dtype=np.int32))
    return SparseIndex(starts[0], values[0], starts[1], values[1])


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(130, 130), (1, 200), (100, 227), (64, 64)])
def test_every_key_block_gives_dense_attention(num_rows: int, num_tokens: int) -> None:
    q_TQH, k_SNH, v_SNH = make_qkv(num_rows, num_tokens)
    all_blocks = list(range(-(-num_tokens // BLOCK)))
    num_blocks = -(-num_rows // BLOCK)
    index = make_index([[(all_blocks, [])] * num_blocks] * NUM_HEADS)
    expected = attend(q_TQH, k_SNH, v_SNH)
    torch.testing.assert_close(attend_sparse(q_TQH, k_SNH, v_SNH, index), expected)


#: Of 100 rows after 127 tokens: rows 0-63 are positions 127-190, rows 64-99 are 191-226, and each
#: has its own among its keys. Heads and query blocks differ.
ENTRIES: list[list[tuple[list[int], list[int]]]] = [
    [([1, 2], []), ([2, 3], [0, 5, 70])],
    [([1, 2], []), ([0, 2, 3], [])],
    [([1, 2, 3], [3]), ([2, 3], list(range(0, 128)))],
    [([0, 1, 2], [200, 226]), ([2, 3], [])],
]


def test_blocks_and_columns_give_the_attention_of_their_mask() -> None:
    q_TQH, k_SNH, v_SNH = make_qkv(100, 227)
    index = make_index(ENTRIES)
    mask_QTS = torch.zeros(NUM_HEADS, 100, 227, dtype=torch.bool)
    for head, blocks in enumerate(ENTRIES):
        for block, (key_blocks, columns) in enumerate(blocks):
            rows = slice(BLOCK * block, BLOCK * (block + 1))
            mask_QTS[head, rows, columns] = True
            for j in key_blocks:
                mask_QTS[head, rows, BLOCK * j : BLOCK * (j + 1)] = True
    mask_QTS &= torch.ones(100, 227, dtype=torch.bool).tril(127)
    kv_heads = torch.arange(NUM_HEADS) % NUM_KV_HEADS
    expected = F.scaled_dot_product_attention(
        q_TQH.transpose(0, 1),
        k_SNH[:, kv_heads].transpose(0, 1),
        v_SNH[:, kv_heads].transpose(0, 1),
        attn_mask=mask_QTS,
    ).transpose(0, 1)
    torch.testing.assert_close(attend_sparse(q_TQH, k_SNH, v_SNH, index), expected)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_the_triton_kernel_equals_the_reference(dtype: torch.dtype, atol: float) -> None:
    """Views into a pool, as a span's keys are; every element is to be written."""
    q_TQH, k_SNH, v_SNH = (t.to(dtype) for t in make_qkv(100, 227))
    pool = torch.stack([k_SNH, v_SNH])
    index = make_index(ENTRIES)
    out = torch.full_like(q_TQH, float("nan"))
    with torch.no_grad():
        sparse_attention_triton.attend_sparse(q_TQH, pool[0], pool[1], index, out)
    expected = attend_sparse(q_TQH, k_SNH, v_SNH, index)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=atol)


def test_the_triton_kernel_takes_any_head_dim_and_a_single_row() -> None:
    torch.manual_seed(0)
    q_TQH, k_SNH, v_SNH = torch.randn(1, 1, 24), *torch.randn(2, 130, 1, 24)
    index = make_index([[([0, 2], [64, 100])]])
    expected = attend_sparse(q_TQH, k_SNH, v_SNH, index)
    out = sparse_attention_triton.attend_sparse(q_TQH, k_SNH, v_SNH, index)
    torch.testing.assert_close(out, expected)
