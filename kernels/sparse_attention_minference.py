"""Sparse attention by MInference's kernel, where the `minference` package is installed.

Never run here: the package needs nvcc and an older transformers. The call is as in its source at
commit 78bb77b, `ops/pit_sparse_flash_attention_v2.py`: it takes an index of blocks and columns as
ours is, in rectangles, where its public calls build their own, for a whole prompt at once.

Shapes: T rows, S tokens with keys and values, P of them with padding, N kv heads, Q query heads,
H head dim, B query blocks, X longest entry.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from minference.ops.pit_sparse_flash_attention_v2 import _triton_mixed_sparse_attention
from torch import Tensor

from colm_serve.kernels.sparse_attention import BLOCK, SparseIndex


def can_attend(q_TQH: Tensor, k_SNH: Tensor) -> bool:
    """Whether the kernel takes these: 16 bits, its head sizes, rows from a whole block on."""
    start = k_SNH.shape[0] - q_TQH.shape[0]
    has_dtype = q_TQH.dtype in (torch.float16, torch.bfloat16)
    return has_dtype and q_TQH.shape[2] in (16, 32, 64, 128) and start % BLOCK == 0


def attend_sparse(q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor, index: SparseIndex) -> Tensor:
    """As `kernels.sparse_attention.attend_sparse`, of what `can_attend`."""
    num_rows, num_heads, head_dim = q_TQH.shape
    num_tokens, num_kv_heads = k_SNH.shape[:2]
    start, missing = num_tokens - num_rows, -num_tokens % BLOCK
    device = q_TQH.device
    kv_heads = torch.arange(num_heads, device=device) % num_kv_heads
    # It knows no span amid a sequence: rows of zeros without keys stand for those before.
    q_QPH = F.pad(q_TQH.transpose(0, 1), (0, 0, start, missing))
    k_QPH, v_QPH = (
        F.pad(x_SNH[:, kv_heads].transpose(0, 1), (0, 0, 0, missing)) for x_SNH in (k_SNH, v_SNH)
    )
    blocks = _rectangle(index.block_starts, index.key_blocks, start // BLOCK, BLOCK)
    columns = _rectangle(index.column_starts, index.columns, start // BLOCK, 1)
    o_QPH = _triton_mixed_sparse_attention(
        q_QPH[None],
        k_QPH[None],
        v_QPH[None],
        torch.tensor([num_tokens], dtype=torch.int32, device=device),
        *(torch.from_numpy(array)[None].to(device) for array in (*blocks, *columns)),
        head_dim**-0.5,
    )[0]
    out: Tensor = o_QPH[:, start:num_tokens].transpose(0, 1)
    return out


def _rectangle(
    starts: np.ndarray, values: np.ndarray, num_before: int, scale: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 counts [Q, B] and scaled values [Q, B, X], with `num_before` empty blocks first."""
    counts_QB = np.diff(starts, axis=1)
    longest = max(int(counts_QB.max()), 1)
    is_value_QBX = np.arange(longest) < counts_QB[:, :, None]
    values_QBX = np.zeros(is_value_QBX.shape, dtype=np.int32)
    values_QBX[is_value_QBX] = values * scale
    before = ((0, 0), (num_before, 0))
    return np.pad(counts_QB.astype(np.int32), before), np.pad(values_QBX, (*before, (0, 0)))
