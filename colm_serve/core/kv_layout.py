"""The sizes of a KV cache entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KvLayout:
    """The sizes of a KV cache entry; workers exchange KV only when these agree."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def num_elements_per_token(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim
