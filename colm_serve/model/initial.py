"""Weights as training begins with them: of a whole model, and of a chain added to one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from colm_serve.model.checkpoint import chain_tensors
from colm_serve.model.config import ColmConfig
from colm_serve.model.layers import init_weight
from colm_serve.model.transformer import ColmModel


def initial_model(config: ColmConfig, seed: int) -> ColmModel:
    """The model before its first step: the same for the same seed, on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ColmModel(config)
    for name, parameter in model.named_parameters():
        _scale(name, parameter, config)
    return model


def initial_chain(
    config: ColmConfig, chain: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What chain `chain`, counted from 1, adds before its first step, by stored name."""
    with torch.device("meta"):
        model = ColmModel(config, chain)
    tensors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, placeholder in chain_tensors(model, chain):
            tensor = torch.empty(placeholder.shape)
            init_weight(model.get_submodule(name.removesuffix(".weight")), tensor)
            _scale(name, tensor, config)
            tensors[name] = tensor.to(dtype)
    return tensors


@torch.no_grad()
def _scale(name: str, weight: Tensor, config: ColmConfig) -> None:
    # What each block adds to the residual stream starts small, the more so the deeper the stack.
    if ".wo." in name or ".w2." in name:
        weight.mul_(1 / math.sqrt(2 * config.num_layers))
