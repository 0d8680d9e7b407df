"""Small models of every variant, with no weight left at its starting value, and their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from colm_serve.model.chain_file import chain_path
from colm_serve.model.config import ColmConfig
from colm_serve.model.rope_scaling import Llama3RopeScaling
from colm_serve.model.transformer import ColmModel
from tests.helpers import TINY

SMALL = replace(TINY, max_context=64)
AIR = {
    "air": SMALL,
    "air-interleave": replace(SMALL, kv_repeat="interleave"),
    "air-per_level": replace(SMALL, head="per_level"),
    "air-tied": replace(SMALL, tie_embeddings=True),
    "air-gelu": replace(SMALL, ffn="gelu", kv_repeat="interleave"),
    "air-rope_scaling": replace(SMALL, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 32)),
}
PER_CHAIN = {
    "per_chain": replace(SMALL, kv_sharing="per_chain", num_kv_heads=4),
    "per_chain-interleave": replace(
        SMALL, kv_sharing="per_chain", num_kv_heads=4, kv_repeat="interleave", head="per_level"
    ),
    "per_chain-gelu-tied": replace(
        SMALL, kv_sharing="per_chain", num_kv_heads=4, ffn="gelu", tie_embeddings=True
    ),
}
VARIANTS = {**AIR, **PER_CHAIN}


@torch.no_grad()
def random_model(config: ColmConfig, seed: int = 0) -> ColmModel:
    """Every weight random, norms too, of a size that keeps activations near one."""
    torch.manual_seed(seed)
    model = ColmModel(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.normal_(mean=1.0, std=0.2)
        else:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    for weight in model.embedding.weights:
        weight.normal_()
    return model.eval()


def unseal(folder: Path) -> None:
    """Leave a folder as versions before manifests wrote it, to change its files by hand."""
    (folder / "manifest.json").unlink(missing_ok=True)


def read_chain(folder: Path, chain: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a chain's file."""
    with safe_open(chain_path(folder, chain), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata())
