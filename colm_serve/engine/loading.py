"""Open a model folder for a worker: threads, dtype, device, KV layout."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from colm_serve.core import KvLayout
from colm_serve.errors import Incompatible, InvalidConfig
from colm_serve.kv.pool import KvPool
from colm_serve.model.checkpoint import LoadedModel, load_cpu_model, load_model
from colm_serve.model.cpu_model import CpuModel
from colm_serve.model.folder import ModelFolder
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import ColmModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_for_serving(
    folder: Path, *, num_chains: int | None, with_head: bool, weight_dtype: str = "auto"
) -> LoadedModel[ServingModel]:
    """Load chains for serving: computed in fp32 on a CPU, in bf16 on a GPU.

    Args:
        weight_dtype: see `config.DecodeConfig`.

    Raises:
        Incompatible: the model's K and V differ by level, so a prefill worker's chain 1 could
            not make them for the decode worker.
        InvalidConfig: the device cannot keep weights so.
        CheckpointError, InvalidConfig: as `load_model`.
    """
    opened = ModelFolder.open(folder, num_chains)
    config = opened.config
    if config.kv_sharing != "air" and config.num_chains > 1:
        raise Incompatible(
            f"{folder}: kv_sharing is {config.kv_sharing!r}: only CoLM-Air ('air') and one-chain "
            "models can be served, since prefill workers hold chain 1 alone"
        )
    device = pick_device()
    if device.type == "cpu":
        dtype = torch.float32 if weight_dtype == "auto" else _DTYPES[weight_dtype]
        loaded = load_cpu_model(opened, num_chains, with_head=with_head, weight_dtype=dtype)
        return_freed_memory()
        return loaded
    if weight_dtype not in ("auto", "bfloat16"):
        raise InvalidConfig("decode.weight_dtype", weight_dtype, "auto or bfloat16 on a GPU")
    return load_model(opened, num_chains, with_head=with_head, dtype=torch.bfloat16, device=device)


def return_freed_memory() -> None:
    """Give the system what weights took that are gone."""
    # Those that were unpacked: of a chain 1 of 133 MB, 38 MB that glibc would keep.
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def to_serving(model: ColmModel) -> ServingModel:
    """A model that is in memory, as `load_for_serving` would give it."""
    device = pick_device()
    if device.type == "cpu":
        return CpuModel.pack(model)
    return model.requires_grad_(False).eval().to(device, torch.bfloat16)


def kv_layout(loaded: LoadedModel[ServingModel]) -> KvLayout:
    """The layout of the keys and values that this model makes."""
    config = loaded.model.config
    dtype = str(loaded.model.kv_dtype).removeprefix("torch.")
    return KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, dtype)


def make_pool(loaded: LoadedModel[ServingModel], num_pages: int, page_size: int) -> KvPool:
    return KvPool(kv_layout(loaded), num_pages, page_size, loaded.model.device)
