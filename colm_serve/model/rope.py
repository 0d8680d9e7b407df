"""Rotary position embedding, with LLaMA 3's frequency rescaling.

Shapes: T rows (tokens), N heads, H head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from colm_serve.model.config import ColmConfig
from colm_serve.model.rope_scaling import Llama3RopeScaling


def rotation_table(config: ColmConfig) -> Tensor:
    """cos and sin of every position and frequency: [max_context, 2, head_dim / 2], fp32, on CPU.

    A function of the config alone, so it is computed even where weights are only placeholders.
    """
    exponents = torch.arange(0, config.head_dim, 2, device="cpu") / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = _rescale(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(config.max_context, device="cpu").float(), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def _rescale(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow rotations are divided by `factor`, fast ones kept, those between interpolated."""
    turns = scaling.original_max_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x_TNH: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate each head's halves against each other, as LLaMA's reference code pairs them.

    Args:
        x_TNH: [T, N, H].
        cos_sin: [T, 2, H / 2], the table's rows at these tokens' positions.
    """
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    half = x_TNH.shape[-1] // 2
    low, high = x_TNH[..., :half], x_TNH[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_TNH.dtype)
