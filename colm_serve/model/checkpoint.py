"""Models read from their folders, and written to them.

File i holds what chain i adds, so the first k files are the level-k model and a prefill worker
opens one. What is missing, truncated, damaged or from another model or save is refused; see
`folder` for what keeps files together.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from colm_serve.errors import CheckpointError
from colm_serve.model.chain_file import ChainFile, write_chain
from colm_serve.model.config import ColmConfig
from colm_serve.model.cpu_model import CpuModel
from colm_serve.model.folder import ModelFolder, new_model, other_files
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
    opened = ModelFolder.open(folder)
    check_shapes(opened)
    return opened.config


def seal(folder: Path) -> ColmConfig:
    """Check a folder's files, contents and all, and write the manifest that says they are a model.

    Raises:
        CheckpointError: as `load_model`, but for the manifest that is there.
        WriteFailed: as on a full disk.
    """
    found = ModelFolder.as_found(folder)
    check_shapes(found)
    for chain in found.chains():
        chain.check_content()
    found.manifest.write(folder)
    return found.config


def copy_carried_files(base: ModelFolder, target: Path) -> None:
    """Copy what stays true of the model with other upper chains, the tokenizer above all.

    Raises:
        CheckpointError: `base` has been replaced since it was opened.
    """
    for path in other_files(base.path):
        if path.is_file() and path.name != "eval.json":
            shutil.copyfile(path, target / path.name)
    base.check_unchanged()


def save_model(
    model: ColmModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    first_chains: Sequence[ChainFile] = (),
) -> None:
    """Write a model folder, all or nothing.

    Args:
        model, dtype, first_chains: as for `write_model`.
        folder: created, or replaced in one step by one with the new model's files; other files in
            it stay. It cannot be a mount point.

    Raises:
        WriteFailed: as on a full disk.
    """
    with new_model(folder) as staging:
        write_model(model, staging, dtype, first_chains=first_chains)


def write_model(
    model: ColmModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    first_chains: Sequence[ChainFile] = (),
) -> None:
    """Write `config.json` and a file per chain into a folder that `new_model` has given.

    Args:
        model: must hold every chain of its config and a head.
        dtype: stored dtype; default: the parameters' own.
        first_chains: which are copied as they are.

    Raises:
        CheckpointError: a file of the first chains has been replaced.
        WriteFailed: as on a full disk.
    """
    model.config.save(folder)
    base = None
    for chain in range(1, model.num_chains + 1):
        if chain <= len(first_chains):
            file = first_chains[chain - 1].copy_to(folder)
        else:
            file = write_chain(folder, chain, _stored_tensors(model, chain, dtype), base)
        base = file.base


def _stored_tensors(model: ColmModel, chain: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: stored_order(name, model.config, chain, tensor.detach()).to(
            device="cpu", dtype=dtype or tensor.dtype
        )
        for name, tensor in chain_tensors(model, chain)
    }


def load_model(
    folder: Path | ModelFolder,
    num_chains: int | None = None,
    *,
    with_head: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedModel[ColmModel]:
    """Open the first `num_chains` chain files (default: all) as a model.

    Raises:
        CheckpointError: a file is missing, truncated, damaged, of another model, of another save
            than the rest or replaced meanwhile, or it holds a tensor that is missing or has
            another shape than the config gives; the message names file and tensor.
        InvalidConfig: it has fewer chains than are asked for.
    """
    opened = _open(folder, num_chains)
    model = _make_empty(opened, num_chains, with_head)
    for chain in range(1, model.num_chains + 1):
        _load_chain(model, opened.chain(chain), dtype, device)
    model.rotations = model.rotations.to(device)
    model.requires_grad_(False)
    return LoadedModel(model.eval(), kv_identity_of(opened), opened.path)


def load_cpu_model(
    folder: Path | ModelFolder,
    num_chains: int | None = None,
    *,
    with_head: bool = True,
    weight_dtype: torch.dtype = torch.float32,
) -> LoadedModel[CpuModel]:
    """As `load_model`, packed for serving on a CPU; holds one file at a time beside the result."""
    opened = _open(folder, num_chains)
    model = _make_empty(opened, num_chains, with_head)
    packed = CpuModel(model.config, model.num_chains, with_head=with_head, dtype=weight_dtype)
    for chain in range(1, model.num_chains + 1):
        _load_chain(model, opened.chain(chain), torch.float32, "cpu")
        packed.take_chain(model, chain)
        for _, owner, index in _chain_slots(model, chain):
            owner[index] = nn.Parameter(owner[index].detach().to("meta"), requires_grad=False)
    return LoadedModel(packed, kv_identity_of(opened), opened.path)


def _open(folder: Path | ModelFolder, num_chains: int | None) -> ModelFolder:
    return folder if isinstance(folder, ModelFolder) else ModelFolder.open(folder, num_chains)


def _make_empty(folder: ModelFolder, num_chains: int | None, with_head: bool) -> ColmModel:
    with torch.device("meta"):
        return ColmModel(folder.config, num_chains, with_head=with_head)


def check_shapes(folder: ModelFolder) -> None:
    """Raise CheckpointError unless every chain's tensors are those of the config's model."""
    model = _make_empty(folder, None, with_head=True)
    for file in folder.chains():
        _check_chain_shapes(file.path, file.shapes(), dict(chain_tensors(model, file.chain)))


def _load_chain(
    model: ColmModel, file: ChainFile, dtype: torch.dtype, device: torch.device | str
) -> None:
    tensors = file.read()
    slots = dict(chain_tensors(model, file.chain))
    unread = set() if model.head is not None else _HEAD_TENSORS
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if name not in unread}
    _check_chain_shapes(file.path, shapes, slots)
    for name in slots:
        tensor = runtime_order(name, model.config, file.chain, tensors[name])
        _assign(model, file.chain, name, tensor.to(device=device, dtype=dtype).contiguous())


def _check_chain_shapes(
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
