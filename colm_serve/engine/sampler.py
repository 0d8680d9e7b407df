"""Choose the next token of each row: greedy, or a draw keyed by (seed, position).

A draw depends on nothing but the row's own scores, seed and position, so a request continues
with the same text on another worker, in another batch, after a restart.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from colm_serve.core import SamplingParams


def sample(
    logits_BV: Tensor, sampling: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """One token id a row.

    Args:
        logits_BV: [B, V] scores.
        sampling: each row's parameters.
        positions: the position in its sequence that each row's new token will have.
    """
    chosen: list[int] = logits_BV.argmax(dim=-1).tolist()
    for row, (params, position) in enumerate(zip(sampling, positions, strict=True)):
        if params.temperature > 0:
            chosen[row] = _draw(logits_BV[row], params, position)
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of (seed, position) alone."""
    return float(xxhash.xxh3_64_intdigest(struct.pack("<QQ", seed, position)) >> 11) * 2.0**-53


def _draw(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """Inverse transform over the filtered distribution, likeliest token first."""
    scores, order = torch.sort(logits_V.float() / params.temperature, descending=True)
    if params.top_k:
        scores = scores[: params.top_k]
    probabilities = torch.softmax(scores, dim=-1).double()
    cumulative = probabilities.cumsum(dim=-1)
    if params.top_p < 1:
        # The smallest set whose mass reaches top_p: a token stays if the mass before it does not.
        num_kept = int((cumulative - probabilities < params.top_p).sum())
        cumulative = cumulative[:num_kept]
    target = uniform(params.seed, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True))
    return int(order[min(index, len(cumulative) - 1)])
