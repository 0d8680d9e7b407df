"""A CoLM as the paper's pseudo code has it, straight from the tensors of the chain files.

One sequence at one level; nothing is shared with the implementation but the stored names.

Shapes: S tokens, D model width, H head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_serve.model.config import ColmConfig


class PaperModel:
    """The level that the given chain files make."""

    def __init__(self, config: ColmConfig, chains: Sequence[dict[str, Tensor]]) -> None:
        self.config = config
        self.chains = chains

    def logits(self, tokens_S: Tensor) -> Tensor:
        """[S] token ids to [S, V]."""
        x_SD = torch.cat([c["embedding.weight"][tokens_S] for c in self.chains], dim=-1)
        for layer in range(self.config.num_layers):
            name = f"blocks.{layer}"
            x_SD = x_SD + self._attention(f"{name}.attn", self._norm(f"{name}.attn_norm", x_SD))
            x_SD = x_SD + self._ffn(f"{name}.ffn", self._norm(f"{name}.ffn_norm", x_SD))
        x_SD = self._norm("norm", x_SD)
        if self.config.head == "per_level":
            return x_SD @ self.chains[-1]["head.weight"].T
        name = "embedding.weight" if self.config.tie_embeddings else "head.weight"
        return x_SD @ torch.cat([c[name] for c in self.chains], dim=1).T

    def _linear(self, name: str, x_SD: Tensor) -> Tensor:
        """Algorithm 1."""
        weights = [c[f"{name}.weight"] for c in self.chains if f"{name}.weight" in c]
        return torch.cat([F.linear(x_SD[:, : w.shape[1]], w) for w in weights], dim=-1)

    def _norm(self, name: str, x_SD: Tensor) -> Tensor:
        """Figure 4."""
        gains = [c[f"{name}.weight"] for c in self.chains]
        parts = zip(x_SD.split([len(g) for g in gains], dim=-1), gains, strict=True)
        return torch.cat([F.rms_norm(x, g.shape, g, self.config.rms_norm_eps) for x, g in parts], 1)

    def _ffn(self, name: str, x_SD: Tensor) -> Tensor:
        """Algorithms 4 and 5."""
        h = self._linear(f"{name}.w1", x_SD)
        if self.config.ffn == "gelu":
            return self._linear(f"{name}.w2", F.gelu(h))
        return self._linear(f"{name}.w2", F.silu(h) * self._linear(f"{name}.w3", x_SD))

    def _attention(self, name: str, x_SD: Tensor) -> Tensor:
        """Algorithms 2 and 3, a head at a time."""
        config = self.config
        q = self._rotate(self._heads(self._linear(f"{name}.wq", x_SD)))
        k = self._rotate(self._heads(self._linear(f"{name}.wk", x_SD)))
        v = self._heads(self._linear(f"{name}.wv", x_SD))
        outputs: list[Tensor] = []
        first_kv = 0
        for i in range(len(self.chains)):
            num_heads = config.heads_per_chain[i]
            is_air = config.kv_sharing == "air"
            num_kv = config.num_kv_heads if is_air else config.kv_heads_per_chain[i]
            for j in range(num_heads):
                repeats = num_heads // num_kv
                kv = first_kv + (j % num_kv if config.kv_repeat == "tile" else j // repeats)
                outputs.append(self._attend(q[len(outputs)], k[kv], v[kv]))
            first_kv += 0 if is_air else num_kv
        return self._linear(f"{name}.wo", torch.cat(outputs, dim=-1))

    def _heads(self, x_SD: Tensor) -> Sequence[Tensor]:
        heads_SH: Sequence[Tensor] = x_SD.split(self.config.head_dim, dim=-1)
        return heads_SH

    def _rotate(self, heads_SH: Sequence[Tensor]) -> list[Tensor]:
        """Element j and j + H/2 of a head are a complex number that turns with the position."""
        dim = self.config.head_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.outer(torch.arange(len(heads_SH[0])).float(), frequencies)
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = [torch.complex(*x.chunk(2, dim=-1)) * turn for x in heads_SH]
        return [torch.cat([z.real, z.imag], dim=-1) for z in turned]

    def _attend(self, q_SH: Tensor, k_SH: Tensor, v_SH: Tensor) -> Tensor:
        scores = q_SH @ k_SH.T / self.config.head_dim**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        out_SH: Tensor = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v_SH
        return out_SH
