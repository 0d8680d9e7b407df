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
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    k_SH[column] = direction * _STRONG
    return q_SH + direction * 5, k_SH


def on_slash(offset: int, num_tokens: int, run: int = 1) -> tuple[Tensor, Tensor]:
    """Every query attends to the key `offset` before it, and to the equal ones of its run."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(-(-num_tokens // run), 64), dim=1)
    k_SH = directions.repeat_interleave(run, dim=0)[:num_tokens] * 10
    q_SH = torch.randn(num_tokens, 64)
    q_SH[offset:] += k_SH[: num_tokens - offset] * 2
    return q_SH, k_SH


def on_blocks(pairs: dict[int, int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """The queries of block b attend to all keys of block `pairs[b]`; [S, H] each."""
    torch.manual_seed(0)
    q_SH, k_SH = torch.randn(2, num_tokens, 32) * 0.1
    directions = torch.nn.functional.normalize(torch.randn(len(pairs), 32), dim=1) * 10
    for direction, (query_block, key_block) in zip(directions, pairs.items(), strict=True):
        q_SH[query_block * 64 : query_block * 64 + 64] += direction
        k_SH[key_block * 64 : key_block * 64 + 64] += direction
    return q_SH, k_SH
