"""Rotation, KV store and attention over a paged cache on a CPU, for all rows of a batch at once.

A row is one query token of some sequence, at some level; it reads the pages of its sequence where
they lie. Its result does not depend on the other rows.

Shapes: T rows, Q query heads, N kv heads, M heads of all kinds, H head dim, C slots of the pool.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from colm_serve.kernels.jit_cpu import kernel
from colm_serve.kernels.math_cpu import exp

#: Fewer rows than this are not worth waking other threads for.
_FEW_ROWS = 16


@kernel()
def rotate_and_store(
    qkv_TMH, num_heads_T, first_key, positions_T, slots_T, rotations, k_CNH, v_CNH, num_threads
):
    """Rotate queries and keys in place and put every row's key and value into its slot.

    Args:
        qkv_TMH: each row's query heads, from `first_key` on its key heads, then its value heads.
        num_heads_T: int64, query heads of each row's level.
        positions_T: int64, each row's place in its sequence.
        slots_T: int64, each row's place in the pool.
        rotations: [positions, 2, H / 2], `model.rope.rotation_table`.
        k_CNH, v_CNH: one layer of the pool.
        num_threads: among which many rows are shared out.
    """
    if len(slots_T) < _FEW_ROWS:
        _rotate_share(
            qkv_TMH, num_heads_T, first_key, positions_T, slots_T, rotations, k_CNH, v_CNH, 0, 1
        )
    else:
        _rotate_all(
            qkv_TMH, num_heads_T, first_key, positions_T, slots_T, rotations, k_CNH, v_CNH,
            num_threads,
        )  # fmt: skip


@kernel(parallel=True, fastmath=True)
def _rotate_all(
    qkv_TMH, num_heads_T, first_key, positions_T, slots_T, rotations, k_CNH, v_CNH, num_threads
):
    for thread in prange(num_threads):
        _rotate_share(
            qkv_TMH, num_heads_T, first_key, positions_T, slots_T, rotations, k_CNH, v_CNH,
            thread, num_threads,
        )  # fmt: skip


@kernel(fastmath=True)
def _rotate_share(
    qkv_TMH, num_heads_T, first_key, positions_T, slots_T, rotations, k_CNH, v_CNH, share,
    num_shares,
):  # fmt: skip
    num_kv_heads, num_rows = k_CNH.shape[1], len(slots_T)
    for row in range(num_rows * share // num_shares, num_rows * (share + 1) // num_shares):
        cos, sin = rotations[positions_T[row], 0], rotations[positions_T[row], 1]
        for head in range(num_heads_T[row]):
            _rotate(qkv_TMH[row, head], cos, sin)
        for head in range(num_kv_heads):
            _rotate(qkv_TMH[row, first_key + head], cos, sin)
            _copy(qkv_TMH[row, first_key + head], k_CNH[slots_T[row], head])
            _copy(qkv_TMH[row, first_key + num_kv_heads + head], v_CNH[slots_T[row], head])


@kernel()
def _copy(source, target):
    for i in range(len(target)):
        target[i] = source[i]


@kernel(fastmath=True)
def _rotate(x_H, cos, sin):
    """Each of the first half against its partner in the second, as `model.rope.rotate` pairs."""
    low, high = x_H[: len(cos)], x_H[len(cos) :]
    for i in range(len(cos)):
        a, b = low[i], high[i]
        low[i] = a * cos[i] - b * sin[i]
        high[i] = b * cos[i] + a * sin[i]


@kernel(parallel=True, fastmath=True)
def attend(
    q_TMH, rows, num_heads_T, positions_T, page_starts_T, pages, page_size, k_CNH, v_CNH, out_TQH,
    num_threads,
):  # fmt: skip
    """Attention of single rows; as `kernels.paged_attention.attend` for each.

    Args:
        q_TMH: each row's rotated query heads, from head 0.
        rows: int64, which rows to compute.
        num_heads_T: int64, query heads of each row's level.
        positions_T: int64; a row sees the tokens up to its own position.
        page_starts_T: int64, where each row's pages begin in `pages`.
        pages: int64, the pages of the sequences in the order of their tokens.
        out_TQH: fp32; the heads of each row's level are written.
    """
    num_kv_heads = k_CNH.shape[1]
    num_items = len(rows) * num_kv_heads
    for thread in prange(num_threads):
        item = num_items * thread // num_threads
        end = num_items * (thread + 1) // num_threads
        while item < end:
            row = rows[item // num_kv_heads]
            first_head = item % num_kv_heads
            end_head = min(num_kv_heads, first_head + end - item)
            _attend_heads(
                q_TMH[row], num_heads_T[row] // num_kv_heads, first_head, end_head,
                positions_T[row] + 1, pages[page_starts_T[row] :], page_size, k_CNH, v_CNH,
                out_TQH[row],
            )  # fmt: skip
            item += end_head - first_head


@kernel(fastmath=True)
def _attend_heads(
    q_MH, num_repeats, first_head, end_head, num_tokens, pages, page_size, k_CNH, v_CNH, out_QH
):  # fmt: skip
    """The query heads of one row that read kv heads [first_head, end_head).

    Tokens outermost: a token's kv heads are neighbours in memory.
    """
    num_kv_heads, head_dim = k_CNH.shape[1], k_CNH.shape[2]
    scores = np.empty((end_head - first_head, num_repeats, num_tokens), np.float32)
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for first in range(0, num_tokens, page_size):
        slot = pages[first // page_size] * page_size
        for i in range(min(page_size, num_tokens - first)):
            for head in range(first_head, end_head):
                key = k_CNH[slot + i, head]
                for repeat in range(num_repeats):
                    score = _dot(q_MH[repeat * num_kv_heads + head], key) * scale
                    scores[head - first_head, repeat, first + i] = score
    for head in range(first_head, end_head):
        for repeat in range(num_repeats):
            _softmax(scores[head - first_head, repeat])
            out_QH[repeat * num_kv_heads + head] = 0
    for first in range(0, num_tokens, page_size):
        slot = pages[first // page_size] * page_size
        for i in range(min(page_size, num_tokens - first)):
            for head in range(first_head, end_head):
                value = v_CNH[slot + i, head]
                for repeat in range(num_repeats):
                    weight = scores[head - first_head, repeat, first + i]
                    _add_scaled(out_QH[repeat * num_kv_heads + head], value, weight)


@kernel(fastmath=True)
def _dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@kernel(fastmath=True)
def _add_scaled(total, x, weight):
    for i in range(len(total)):
        total[i] += weight * x[i]


@kernel(fastmath=True)
def _softmax(scores):
    highest = scores[0]
    for i in range(1, len(scores)):
        highest = max(highest, scores[i])
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = exp(scores[i] - highest)
        total += scores[i]
    for i in range(len(scores)):
        scores[i] /= total
