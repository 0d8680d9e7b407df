"""The Chain-of-Language-Model: embedding, blocks, norm, heads, top to bottom (paper 3).

Shapes: T rows (tokens), D model width, V vocabulary, B sequences, S tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from colm_serve.model.attention import AttentionContext, CausalContext, ChainAttention
from colm_serve.model.config import ColmConfig
from colm_serve.model.layers import (
    ChainEmbedding,
    ChainLinear,
    ChainRMSNorm,
    PerLevelHead,
    SharedHead,
)
from colm_serve.model.rope import rotation_table


class ChainFeedForward(nn.Module):
    """FFN (Chain): GeLU (Algorithm 4) or SwiGLU (Algorithm 5)."""

    def __init__(self, config: ColmConfig, num_chains: int) -> None:
        super().__init__()
        dims, ff_dims = config.chain_dims[:num_chains], config.chain_ff_dims[:num_chains]
        self.w1 = ChainLinear(dims, ff_dims)
        self.w2 = ChainLinear(ff_dims, dims)
        self.w3 = ChainLinear(dims, ff_dims) if config.ffn == "swiglu" else None

    def forward(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        h = self.w1(x_TD, num_rows)
        h = F.gelu(h) if self.w3 is None else F.silu(h) * self.w3(x_TD, num_rows)
        out: Tensor = self.w2(h, num_rows)
        return out


class ChainBlock(nn.Module):
    """One transformer layer: attention and feed-forward, each behind its norm (Figure 12)."""

    def __init__(self, config: ColmConfig, num_chains: int, layer: int) -> None:
        super().__init__()
        dims = config.chain_dims[:num_chains]
        self.layer = layer
        self.attn_norm = ChainRMSNorm(dims, config.rms_norm_eps)
        self.attn = ChainAttention(config, num_chains)
        self.ffn_norm = ChainRMSNorm(dims, config.rms_norm_eps)
        self.ffn = ChainFeedForward(config, num_chains)

    def forward(
        self, x_TD: Tensor, num_rows: Sequence[int], cos_sin: Tensor, context: AttentionContext
    ) -> Tensor:
        h = self.attn_norm(x_TD, num_rows)
        x_TD = x_TD + self.attn(self.layer, h, num_rows, cos_sin, context)
        h = self.ffn_norm(x_TD, num_rows)
        out: Tensor = x_TD + self.ffn(h, num_rows)
        return out

    def store_kv(
        self, x_TD: Tensor, num_rows: Sequence[int], cos_sin: Tensor, context: AttentionContext
    ) -> None:
        """Keys and values only: all that a prefill needs of the last layer."""
        h = self.attn_norm(x_TD, num_rows)
        self.attn.store_kv(self.layer, h, num_rows, cos_sin, context)


class ColmModel(nn.Module):
    """The first `num_chains` chains of a CoLM: every level up to it, in one set of weights.

    With one chain it is LLaMA. A prefill worker holds `num_chains=1` and calls only
    `prefill`, so with `with_head=False` it has no classifier and no final norm.
    """

    rotations: Tensor

    def __init__(
        self, config: ColmConfig, num_chains: int | None = None, *, with_head: bool = True
    ) -> None:
        super().__init__()
        num_chains = config.num_chains if num_chains is None else num_chains
        config.check_level(num_chains, "num_chains")
        dims = config.chain_dims[:num_chains]
        self.config = config
        self.num_chains = num_chains
        self.recompute_activations = False
        self.embedding = ChainEmbedding(config.vocab_size, dims)
        self.blocks = nn.ModuleList(
            ChainBlock(config, num_chains, layer) for layer in range(config.num_layers)
        )
        self.norm = ChainRMSNorm(dims, config.rms_norm_eps) if with_head else None
        self.head = self._make_head(dims) if with_head else None
        self.register_buffer("rotations", rotation_table(config), persistent=False)

    def _make_head(self, dims: Sequence[int]) -> SharedHead | PerLevelHead:
        if self.config.head == "per_level":
            return PerLevelHead(self.config.vocab_size, dims)
        head = SharedHead(self.config.vocab_size, dims)
        if self.config.tie_embeddings:
            head.weights = self.embedding.weights
        return head

    @property
    def device(self) -> torch.device:
        return self.rotations.device

    @property
    def kv_dtype(self) -> torch.dtype:
        """What keys and values are made in."""
        dtype: torch.dtype = self.embedding.weights[0].dtype
        return dtype

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        num_rows: Sequence[int],
        context: AttentionContext,
    ) -> Tensor:
        """Normalised hidden states [T, D] of rows sorted by level, highest first.

        Args:
            token_ids_T: [T] int64.
            positions_T: [T] int64, each token's place in its own sequence.
            num_rows: leading rows that chain i touches; `level_rows` makes it.
            context: where the sequences' keys and values are.
        """
        assert self.norm is not None, "a model without head only prefills"
        x_TD = self.embedding(token_ids_T, num_rows)
        cos_sin = self.rotations[positions_T]
        for block in self.blocks:
            if self.recompute_activations and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, num_rows, cos_sin, context, use_reentrant=False)
            else:
                x_TD = block(x_TD, num_rows, cos_sin, context)
        out: Tensor = self.norm(x_TD, num_rows)
        return out

    def prefill(self, token_ids_T: Tensor, positions_T: Tensor, context: AttentionContext) -> None:
        """Compute chain 1's keys and values of every layer, and nothing that they do not need.

        The last layer stops after K and V (paper 4.4): its attention and feed-forward would
        only serve a next token, and the decode worker makes that at its own level.
        """
        num_rows = (token_ids_T.shape[0],)
        x_TD = self.embedding(token_ids_T, num_rows)
        cos_sin = self.rotations[positions_T]
        last = len(self.blocks) - 1
        for block in self.blocks:
            assert isinstance(block, ChainBlock)
            if block.layer == last:
                block.store_kv(x_TD, num_rows, cos_sin, context)
            else:
                x_TD = block(x_TD, num_rows, cos_sin, context)

    def logits(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        """Next-token scores [T, V] of normalised hidden states, each row at its own level."""
        assert self.head is not None, "a model without head only prefills"
        out: Tensor = self.head(x_TD, num_rows)
        return out

    def hidden_states(self, token_ids_BS: Tensor, levels: Sequence[int] | None = None) -> Tensor:
        """Normalised hidden states [B * S, D] of whole sequences; for training and evaluation.

        Args:
            token_ids_BS: [B, S] int64.
            levels: each sequence's level, highest first; default: the highest for all.
        """
        num_sequences, seq_len = token_ids_BS.shape
        levels = [self.num_chains] * num_sequences if levels is None else levels
        num_rows = [rows * seq_len for rows in level_rows(levels)]
        positions = torch.arange(seq_len, device=token_ids_BS.device).repeat(num_sequences)
        context = CausalContext(self.config, seq_len)
        out: Tensor = self(token_ids_BS.flatten(), positions, num_rows, context)
        return out

    def level_logits(self, token_ids_BS: Tensor) -> list[Tensor]:
        """Next-token scores [B * S, V] of whole sequences at every level, lowest first."""
        assert self.head is not None, "a model without head only prefills"
        return self.head.all_levels(self.hidden_states(token_ids_BS))


def level_rows(levels: Sequence[int]) -> tuple[int, ...]:
    """How many leading rows each chain touches, for rows at these levels (highest first).

    >>> level_rows([3, 1, 1])
    (3, 1, 1)
    """
    assert all(a >= b for a, b in pairwise(levels)), "highest level first"
    return tuple(sum(level > i for level in levels) for i in range(levels[0] if levels else 0))
