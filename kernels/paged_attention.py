"""Attention of one sequence's rows to its own keys and values, in plain torch: the reference.

Shapes: T rows, S tokens with keys and values, N kv heads, R query heads a kv head, Q query heads,
H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens; query head j reads kv head j % N (tile order).

    Args:
        q_TQH: [T, Q, H], rotated.
        k_SNH: [S, N, H], rotated.
        v_SNH: [S, N, H].

    Returns:
        [T, Q, H].
    """
    if q_TQH.shape[0] == 1:
        return _attend_one(q_TQH, k_SNH, v_SNH)
    return _attend_many(q_TQH, k_SNH, v_SNH)


def _attend_one(q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor) -> Tensor:
    # The query heads that share a kv head go in as that head's query rows: no copy of K and V.
    q_NRH = q_TQH.reshape(-1, k_SNH.shape[1], q_TQH.shape[2]).transpose(0, 1)
    o_NRH = F.scaled_dot_product_attention(
        q_NRH[None], k_SNH.transpose(0, 1)[None], v_SNH.transpose(0, 1)[None]
    )[0]
    return o_NRH.transpose(0, 1).reshape(q_TQH.shape)


def _attend_many(q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor) -> Tensor:
    num_rows, num_tokens, num_kv_heads = q_TQH.shape[0], k_SNH.shape[0], k_SNH.shape[1]
    mask: Tensor | None = None
    if num_rows < num_tokens:
        mask = torch.zeros((num_rows, num_tokens), dtype=q_TQH.dtype, device=q_TQH.device)
        future = torch.ones_like(mask, dtype=torch.bool).triu_(num_tokens - num_rows + 1)
        mask.masked_fill_(future, float("-inf"))
    k, v = k_SNH.transpose(0, 1)[None], v_SNH.transpose(0, 1)[None]
    outputs = []
    # Tile order: each run of N query heads reads the kv heads one to one.
    for q_TNH in q_TQH.split(num_kv_heads, dim=1):
        q = q_TNH.transpose(0, 1)[None]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        outputs.append(o[0].transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
