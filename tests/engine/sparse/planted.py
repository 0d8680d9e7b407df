"""Queries and keys whose attention lies where a test says."""

from __future__ import annotations

import torch
from torch import Tensor

#: Far more than a random key's score.
_STRONG = 60.0


def on_column(column: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Every query attends to one key, once it can see it; [S, H] each."""
    torch.manual_seed(0)
    q_SH, k_SH = torch.randn(2, num_tokens, 32)
    direction = _normalised(torch.randn(1, 32))
    k_SH[column] = direction * _STRONG
    return q_SH + direction * 5, k_SH


def on_slash(offset: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Every query attends to the key `offset` before it; means over blocks are about zero."""
    torch.manual_seed(0)
    k_SH = _normalised(torch.randn(num_tokens // 2, 64)).repeat_interleave(2, dim=0) * 10
    k_SH[1::2] *= -1
    return _attending_to(offset, k_SH), k_SH


def on_broad_slash(offset: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Every query attends to the key `offset` before it and to the 31 others like it."""
    torch.manual_seed(0)
    k_SH = _normalised(torch.randn(num_tokens // 32, 64)).repeat_interleave(32, dim=0) * 10
    return _attending_to(offset, k_SH), k_SH


def on_blocks(pairs: dict[int, int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """The queries of block b attend to all keys of block `pairs[b]`; [S, H] each."""
    torch.manual_seed(0)
    q_SH, k_SH = torch.randn(2, num_tokens, 32) * 0.1
    directions = _normalised(torch.randn(len(pairs), 32)) * 10
    for direction, (query_block, key_block) in zip(directions, pairs.items(), strict=True):
        q_SH[query_block * 64 : query_block * 64 + 64] += direction
        k_SH[key_block * 64 : key_block * 64 + 64] += direction
    return q_SH, k_SH


def _attending_to(offset: int, k_SH: Tensor) -> Tensor:
    q_SH = torch.randn_like(k_SH)
    q_SH[offset:] += k_SH[: len(k_SH) - offset] * 2
    return q_SH


def _normalised(x_SH: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x_SH, dim=1)
