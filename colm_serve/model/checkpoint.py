"""Model folders: `config.json` and one `chain-<i>.safetensors` per chain.

File i holds what chain i adds, so the first k files are the level-k model and a prefill worker
opens one. Each file's header carries its content digest and the digest of the chain-1 file it
was trained on; a file that is missing, truncated, damaged or from another model is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from colm_serve.errors import CheckpointError
from colm_serve.files import writing
from colm_serve.model.chain_file import (
    chain_digest,
    chain_path,
    check_base,
    read_chain,
    read_header,
    read_shapes,
    write_chain,
)
from colm_serve.model.config import ColmConfig
from colm_serve.model.cpu_model import CpuModel
from colm_serve.model.head_order import runtime_order, stored_order
from colm_serve.model.kv_identity import kv_identity_of
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import ColmModel

#: What a model without head leaves unread in a chain's file.
_HEAD_TENSORS = {"norm.weight", "head.weight"}
M_co = TypeVar("M_co", bound=ServingModel, covariant=True)


@dataclass(frozen=True)
class LoadedModel(Generic[M_co]):
    """A model, the name of the keys and values it makes, and the folder it comes from if any."""

    model: M_co
    kv_identity: str
    folder: Path | None = None


def check_folder(folder: Path) -> ColmConfig:
    """Read the config and every chain file's header, shapes and all: a cheap look before workers
    start.

    Raises:
        CheckpointError: as `load_model`, except that contents are not read.
    """
    model = _make_empty(folder, None, with_head=True)
    base = chain_digest(folder, 1)
    for chain in range(1, model.num_chains + 1):
        path = chain_path(folder, chain)
        check_base(path, read_header(path, chain), base)
        _check_shapes(path, read_shapes(folder, chain), dict(chain_tensors(model, chain)))
    return model.config


def carried_files(folder: Path) -> list[Path]:
    """What a model folder has that stays true of the model with other upper chains.

    That is all but config, chains and the levels' held-out losses: the tokenizer above all.
    """
    config = ColmConfig.load(folder)
    chains = {chain_path(folder, chain).name for chain in range(1, config.num_chains + 1)}
    left = chains | {"config.json", "eval.json"}
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in left]


def save_model(
    model: ColmModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    first_files: Sequence[Path] = (),
) -> None:
    """Write `config.json` and a file per chain, all or nothing.

    Args:
        model: must hold every chain of its config and a head.
        folder: created or its model files replaced; other files in it stay.
        dtype: stored dtype; default: the parameters' own.
        first_files: files of the first chains, which are copied as they are.

    Raises:
        WriteFailed: as on a full disk.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write_files(model, staging, dtype, first_files)
            folder.mkdir(exist_ok=True)
            for path in sorted(staging.iterdir()):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _write_files(
    model: ColmModel, folder: Path, dtype: torch.dtype | None, first_files: Sequence[Path]
) -> None:
    model.config.save(folder)
    for chain, path in enumerate(first_files, start=1):
        shutil.copyfile(path, chain_path(folder, chain))
    base = chain_digest(folder, 1) if first_files else None
    for chain in range(len(first_files) + 1, model.num_chains + 1):
        tensors = {
            name: stored_order(name, model.config, chain, tensor.detach()).to(
                device="cpu", dtype=dtype or tensor.dtype
            )
            for name, tensor in chain_tensors(model, chain)
        }
        digest = write_chain(folder, chain, tensors, base)
        base = base or digest


def load_model(
    folder: Path,
    num_chains: int | None = None,
    *,
    with_head: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedModel[ColmModel]:
    """Open the first `num_chains` chain files (default: all) as a model.

    Raises:
        CheckpointError: a file is missing, truncated, damaged, of another model, or holds a
            tensor that is missing or has another shape than the config gives; the message
            names file and tensor.
        InvalidConfig: it has fewer chains than are asked for.
    """
    model = _make_empty(folder, num_chains, with_head)
    base = chain_digest(folder, 1)
    for chain in range(1, model.num_chains + 1):
        _load_chain(model, folder, chain, base, dtype, device)
    model.rotations = model.rotations.to(device)
    model.requires_grad_(False)
    return LoadedModel(model.eval(), kv_identity_of(model.config, base), folder)


def load_cpu_model(
    folder: Path,
    num_chains: int | None = None,
    *,
    with_head: bool = True,
    weight_dtype: torch.dtype = torch.float32,
) -> LoadedModel[CpuModel]:
    """As `load_model`, packed for serving on a CPU; holds one file at a time beside the result."""
    model = _make_empty(folder, num_chains, with_head)
    base = chain_digest(folder, 1)
    packed = CpuModel(model.config, model.num_chains, with_head=with_head, dtype=weight_dtype)
    for chain in range(1, model.num_chains + 1):
        _load_chain(model, folder, chain, base, torch.float32, "cpu")
        packed.take_chain(model, chain)
        for _, owner, index in _chain_slots(model, chain):
            owner[index] = nn.Parameter(owner[index].detach().to("meta"), requires_grad=False)
    return LoadedModel(packed, kv_identity_of(model.config, base), folder)


def _make_empty(folder: Path, num_chains: int | None, with_head: bool) -> ColmModel:
    config = ColmConfig.load(folder)
    with torch.device("meta"):
        return ColmModel(config, num_chains, with_head=with_head)


def _load_chain(
    model: ColmModel,
    folder: Path,
    chain: int,
    base: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    path, tensors = chain_path(folder, chain), read_chain(folder, chain, base)
    slots = dict(chain_tensors(model, chain))
    unread = set() if model.head is not None else _HEAD_TENSORS
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if name not in unread}
    _check_shapes(path, shapes, slots)
    for name in slots:
        tensor = runtime_order(name, model.config, chain, tensors[name])
        _assign(model, chain, name, tensor.to(device=device, dtype=dtype).contiguous())


def _check_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], slots: Mapping[str, nn.Parameter]
) -> None:
    """Raise CheckpointError unless a file's tensors are those of the config's model."""
    if foreign := sorted(found.keys() - slots.keys()):
        raise CheckpointError(
            f"{path}: tensor {foreign[0]} of shape {found[foreign[0]]} has no place in the "
            "config's model"
        )
    for name, parameter in slots.items():
        expected = tuple(parameter.shape)
        if name not in found:
            raise CheckpointError(f"{path}: tensor {name} is missing, expected shape {expected}")
        if found[name] != expected:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {found[name]}, expected {expected}"
            )


def chain_tensors(model: ColmModel, chain: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Stored name and parameter of everything that chain `chain` adds."""
    for name, owner, index in _chain_slots(model, chain):
        yield name, owner[index]


def _chain_slots(model: ColmModel, chain: int) -> Iterator[tuple[str, nn.ParameterList, int]]:
    index = chain - 1
    for module_name, module in model.named_modules():
        for kind, singular in (("weights", "weight"), ("biases", "bias")):
            owner = getattr(module, kind, None)
            if not isinstance(owner, nn.ParameterList) or index >= len(owner):
                continue
            if module_name == "head" and model.config.tie_embeddings:
                continue
            yield f"{module_name}.{singular}", owner, index


def _assign(model: ColmModel, chain: int, name: str, tensor: Tensor) -> None:
    for slot_name, owner, index in _chain_slots(model, chain):
        if slot_name == name:
            owner[index] = nn.Parameter(tensor, requires_grad=False)
