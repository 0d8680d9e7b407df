"""Chain-of-Attention: queries by chain, keys and values from chain 1 (Air) or by chain.

A block computes q, k and v and hands them to an `AttentionContext`, which knows where the other
tokens' keys and values are: in the same batch (`CausalContext`: training, evaluation, scoring)
or in the pages of a KV cache (`colm_serve.model.paged`: serving).

In memory the query heads of a chain stand in tile order, head j reading kv head j % n_kv
(Algorithm 3), so repeats need no copy of K and V; the checkpoint loader puts them so.

Shapes: T rows (tokens), B sequences, S tokens a sequence, N kv heads, R query heads a kv head,
Q query heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colm_serve.model.config import ColmConfig
from colm_serve.model.layers import ChainLinear
from colm_serve.model.rope import rotate


class AttentionContext(Protocol):
    """Where the keys and values of a batch's sequences live."""

    def store(self, layer: int, k_TNH: Tensor, v_TNH: Tensor) -> None:
        """Take this batch's rotated keys and its values of one layer."""

    def attend(self, layer: int, q_TQH: Tensor, num_rows: Sequence[int]) -> Tensor:
        """Attend with every row's own heads; [T, Q, H], zero where a row lacks the head."""


class ChainAttention(nn.Module):
    """Attention (Chain), Algorithm 2, and with KV sharing, Algorithm 3 (3.2.1, 3.3)."""

    def __init__(self, config: ColmConfig, num_chains: int) -> None:
        super().__init__()
        dims = config.chain_dims[:num_chains]
        q_dims = [heads * config.head_dim for heads in config.heads_per_chain[:num_chains]]
        kv_dims = [heads * config.head_dim for heads in config.kv_heads_per_chain[:num_chains]]
        self.head_dim = config.head_dim
        self.num_kv_chains = len(kv_dims)
        self.wq = ChainLinear(dims, q_dims)
        self.wk = ChainLinear(dims[: len(kv_dims)], kv_dims)
        self.wv = ChainLinear(dims[: len(kv_dims)], kv_dims)
        self.wo = ChainLinear(q_dims, dims)

    def store_kv(
        self,
        layer: int,
        x_TD: Tensor,
        num_rows: Sequence[int],
        cos_sin: Tensor,
        context: AttentionContext,
    ) -> None:
        """Compute this layer's keys and values and hand them to the context."""
        rows = num_rows[: self.num_kv_chains]
        k_TNH = self.wk(x_TD, rows).unflatten(-1, (-1, self.head_dim))
        v_TNH = self.wv(x_TD, rows).unflatten(-1, (-1, self.head_dim))
        context.store(layer, rotate(k_TNH, cos_sin), v_TNH)

    def forward(
        self,
        layer: int,
        x_TD: Tensor,
        num_rows: Sequence[int],
        cos_sin: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        """[T, D] normalised hidden states to [T, D] attention output."""
        self.store_kv(layer, x_TD, num_rows, cos_sin, context)
        q_TQH = self.wq(x_TD, num_rows).unflatten(-1, (-1, self.head_dim))
        o_TQH = context.attend(layer, rotate(q_TQH, cos_sin), num_rows)
        out: Tensor = self.wo(o_TQH.flatten(1), num_rows)
        return out


class CausalContext:
    """Sequences of equal length, whole in the batch; each at one level, highest level first."""

    def __init__(self, config: ColmConfig, seq_len: int) -> None:
        self._config = config
        self._seq_len = seq_len
        self._kv: tuple[Tensor, Tensor] | None = None

    def store(self, layer: int, k_TNH: Tensor, v_TNH: Tensor) -> None:
        self._kv = (k_TNH, v_TNH)

    def attend(self, layer: int, q_TQH: Tensor, num_rows: Sequence[int]) -> Tensor:
        assert self._kv is not None, "store comes before attend"
        k_TNH, v_TNH = self._kv
        groups = []
        ends = [*num_rows[1:], 0]
        for level, (end, start) in enumerate(zip(num_rows, ends, strict=True), start=1):
            if end > start:
                rows = slice(start, end)
                groups.append(self._attend_level(level, q_TQH[rows], k_TNH[rows], v_TNH[rows]))
        width = q_TQH.shape[1]
        padded = [F.pad(o, (0, 0, 0, width - o.shape[1])) for o in groups[::-1]]
        return torch.cat(padded) if len(padded) > 1 else padded[0]

    def _attend_level(self, level: int, q_TQH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
        config = self._config
        heads = config.heads_per_chain[:level]
        if config.kv_sharing == "air":
            return self._attend_heads(q_TQH[:, : sum(heads)], k_TNH, v_TNH)
        kv_heads = config.kv_heads_per_chain[:level]
        parts = [
            self._attend_heads(q, k, v)
            for q, k, v in zip(
                q_TQH[:, : sum(heads)].split(heads, dim=1),
                k_TNH[:, : sum(kv_heads)].split(kv_heads, dim=1),
                v_TNH[:, : sum(kv_heads)].split(kv_heads, dim=1),
                strict=True,
            )
        ]
        return torch.cat(parts, dim=1)

    def _attend_heads(self, q_TQH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
        num_repeats = q_TQH.shape[1] // k_TNH.shape[1]
        q = q_TQH.unflatten(0, (-1, self._seq_len)).transpose(1, 2)
        k = k_TNH.unflatten(0, (-1, self._seq_len)).transpose(1, 2).repeat(1, num_repeats, 1, 1)
        v = v_TNH.unflatten(0, (-1, self._seq_len)).transpose(1, 2).repeat(1, num_repeats, 1, 1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return o.transpose(1, 2).flatten(0, 1)
