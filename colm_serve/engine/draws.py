"""Tokens drawn from one row's scores, every draw keyed by (seed, position).

A speculated draw is standard rejection sampling (Leviathan et al. 2023, algorithm 1) of which each
random number is such a key's: what it gives is a function of the two distributions, seed and
position, so a text is the same whatever was drafted for it, and whether anything was.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
import struct
from enum import IntEnum

import torch
import xxhash
from torch import Tensor

from colm_serve.core import SamplingParams

_FIRST_NUCLEUS = 256


class Purpose(IntEnum):
    """What a random number decides; those of one position are independent of each other."""

    TOKEN = 0
    ACCEPTANCE = 1
    RESIDUAL = 2


def uniform(seed: int, position: int, purpose: Purpose = Purpose.TOKEN) -> float:
    """A number in [0, 1) that is a function of its arguments alone."""
    key = struct.pack("<QQ", seed, position)
    return float(xxhash.xxh3_64_intdigest(key, seed=purpose) >> 11) * 2.0**-53


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """[V] probabilities in fp64 after temperature, top-k, min-p and top-p, in this order.

    Args:
        logits_V: finite, or -inf where a token is not to be drawn, but not everywhere.
    """
    scores_V = logits_V.double() / params.temperature
    if 0 < params.top_k < len(scores_V):
        best, order = scores_V.topk(params.top_k)
        scores_V = torch.full_like(scores_V, -math.inf).scatter(0, order, best)
    if params.min_p:
        # A share of the likeliest token's probability is a distance from its score.
        threshold = scores_V.max() + math.log(params.min_p)
        scores_V = scores_V.masked_fill(scores_V < threshold, -math.inf)
    p_V = torch.softmax(scores_V, dim=-1)
    return p_V if params.top_p == 1 else _nucleus(p_V, params.top_p)


def draw(p_V: Tensor, params: SamplingParams, position: int) -> int:
    """A token drawn from `p_V`."""
    return _inverse_transform(p_V, uniform(params.seed, position))


def draw_speculated(p_V: Tensor, q_V: Tensor, params: SamplingParams, position: int) -> int:
    """A token that follows `p_V` and is what `draw` takes from `q_V` as often as can be.

    Args:
        p_V: the model's distribution.
        q_V: the drafter's at the same position.
    """
    token = draw(q_V, params, position)
    p, q = float(p_V[token]), float(q_V[token])
    if uniform(params.seed, position, Purpose.ACCEPTANCE) * q < p:
        return token
    residual_V = (p_V - q_V).clamp_(min=0)
    if not residual_V.any():
        return token  # The two are equal, but for rounding.
    return _inverse_transform(residual_V, uniform(params.seed, position, Purpose.RESIDUAL))


def _nucleus(p_V: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens up to the one with which their mass reaches `top_p`."""
    num_sorted = _FIRST_NUCLEUS
    while True:
        # Sorting all of a large vocabulary takes longer than many a model's step.
        best, order = p_V.topk(min(num_sorted, len(p_V)))
        mass = best.cumsum(dim=0)
        if mass[-1] >= top_p or num_sorted >= len(p_V):
            break
        num_sorted *= 8
    num_kept = int((mass - best < top_p).sum())
    return torch.zeros_like(p_V).scatter(0, order[:num_kept], best[:num_kept] / mass[num_kept - 1])


def _inverse_transform(weights_V: Tensor, number: float) -> int:
    """The token at `number` of the whole weight; never one that has none."""
    cumulative_V = weights_V.cumsum(dim=0)
    index = int(torch.searchsorted(cumulative_V, number * float(cumulative_V[-1]), right=True))
    if index < len(cumulative_V):
        return index
    # Rounded up to the whole: the last token that has some.
    return int(torch.searchsorted(cumulative_V, cumulative_V[-1]))
