"""Model folders: `config.json` and one `chain-<i>.safetensors` per chain.

File i holds what chain i adds, so the first k files are the level-k model and a prefill worker
opens one. Each file's header carries its content digest and the digest of the chain-1 file it
was trained on; a file that is missing, truncated, damaged or from another model is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from colm_serve.errors import CheckpointError
from colm_serve.model.config import ColmConfig
from colm_serve.model.content_digest import ContentDigest
from colm_serve.model.cpu_model import CpuModel
from colm_serve.model.head_order import runtime_order, stored_order
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import ColmModel

_FORMAT = "colm-chain-1"
#: What a model without head leaves unread in a chain's file.
_HEAD_TENSORS = {"norm.weight", "head.weight"}
#: Config keys that decide what chain 1's keys and values are, beside its own sizes.
_KV_KEYS = (
    "vocab_size", "num_layers", "head_dim", "kv_repeat", "ffn", "rope_theta", "rope_scaling",
    "rms_norm_eps",
)  # fmt: skip
#: And those that do where every chain has keys and values of its own.
_CHAIN_KEYS = ("chains", "d_model", "d_ff", "num_heads", "num_kv_heads", "kv_sharing")


M_co = TypeVar("M_co", bound=ServingModel, covariant=True)


@dataclass(frozen=True)
class LoadedModel(Generic[M_co]):
    """A model, the name of the keys and values it makes, and the folder it comes from if any."""

    model: M_co
    kv_identity: str
    folder: Path | None = None


def chain_path(folder: Path, chain: int) -> Path:
    """The file of chain `chain`, counted from 1."""
    return folder / f"chain-{chain}.safetensors"


def kv_identity(folder: Path) -> str:
    """Digest of chain 1's content and the configuration its keys and values depend on.

    Two workers may exchange KV exactly when these agree. Where chain 1 makes all of it, models
    that share chain 1 agree, whatever they have above it: a base, its expansions, tuned variants.
    """
    config = ColmConfig.load(folder)
    return _kv_identity(config, chain_digest(folder, 1))


def chain_digest(folder: Path, chain: int) -> str:
    """The content digest that a chain's file says it has; contents are not read."""
    return _read_header(chain_path(folder, chain), chain)["digest"]


def read_tensor(folder: Path, chain: int, name: str) -> Tensor:
    """One tensor of a chain's file by its stored name; the digest is not checked.

    Raises:
        CheckpointError: the file is missing or truncated, or has no such tensor.
    """
    path = chain_path(folder, chain)
    _read_header(path, chain)
    with safe_open(path, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118
            raise CheckpointError(f"{path}: tensor {name} is missing")
        tensor: Tensor = file.get_tensor(name)
    return tensor


def check_chain(folder: Path, chain: int) -> list[str]:
    """Check a chain's content against its digest, a tensor at a time; returns the stored names.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    path = chain_path(folder, chain)
    header = _read_header(path, chain)
    with safe_open(path, framework="pt") as file:
        names: list[str] = sorted(file.keys())
    _check_digest(path, header, _digest(names, partial(read_tensor, folder, chain)))
    return names


def check_folder(folder: Path) -> ColmConfig:
    """Read the config and every chain file's header: a cheap look before workers start.

    Raises:
        CheckpointError, InvalidConfig: as `load_model`, except that contents are not read.
    """
    config = ColmConfig.load(folder)
    base = chain_digest(folder, 1)
    for chain in range(2, config.num_chains + 1):
        _check_base(chain_path(folder, chain), _read_header(chain_path(folder, chain), chain), base)
    return config


def check_variant(folder: Path, base: Path) -> None:
    """Check that a model has the first chain of another, so that they can share keys and values.

    Raises:
        CheckpointError, InvalidConfig: it has not, or as `check_folder`.
    """
    check_folder(folder)
    if kv_identity(folder) != kv_identity(base):
        raise CheckpointError(
            f"{folder}: its keys and values are not those of {base}: a variant shares chain 1's "
            "file and sizes, as `colm expand` and tuning with frozen chains keep them"
        )


def _kv_identity(config: ColmConfig, chain_1_digest: str) -> str:
    raw = config.to_dict()
    relevant = {key: raw[key] for key in _KV_KEYS}
    relevant["chain_1"] = (
        config.chain_dims[0],
        config.chain_ff_dims[0],
        config.heads_per_chain[0],
        config.kv_heads_per_chain[0],
    )
    if config.kv_sharing == "per_chain" and config.num_chains > 1:
        relevant |= {key: raw[key] for key in _CHAIN_KEYS}
    text = json.dumps([chain_1_digest, relevant], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


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
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.config.save(staging)
        for chain, path in enumerate(first_files, start=1):
            shutil.copyfile(path, chain_path(staging, chain))
        base = chain_digest(staging, 1) if first_files else None
        for chain in range(len(first_files) + 1, model.num_chains + 1):
            tensors = {
                name: stored_order(name, model.config, chain, tensor.detach()).to(
                    device="cpu", dtype=dtype or tensor.dtype
                )
                for name, tensor in chain_tensors(model, chain)
            }
            digest = write_chain(staging, chain, tensors, base)
            base = base or digest
        folder.mkdir(exist_ok=True)
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_chain(
    folder: Path, chain: int, tensors: Mapping[str, Tensor], base: str | None = None
) -> str:
    """Write a chain's file and return its content digest.

    Args:
        folder: must be there.
        chain: counted from 1.
        tensors: by stored name, query heads in the config's order.
        base: digest of the chain 1 it belongs to; None for chain 1 itself.
    """
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = _digest(stored, stored.__getitem__)
    path = chain_path(folder, chain)
    save_file(stored, path, chain_header(chain, digest, base))
    path.chmod(0o644)  # safetensors would keep it to its owner
    return digest


def chain_header(chain: int, digest: str, base: str | None = None) -> dict[str, str]:
    """What a chain's file says of itself; `write_chain` explains the arguments."""
    return {"format": _FORMAT, "chain": str(chain), "digest": digest, "base": base or digest}


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
        InvalidConfig: config.json has a value that is not allowed.
    """
    model = _make_empty(folder, num_chains, with_head)
    base = chain_digest(folder, 1)
    for chain in range(1, model.num_chains + 1):
        _load_chain(model, folder, chain, base, dtype, device)
    model.rotations = model.rotations.to(device)
    model.requires_grad_(False)
    return LoadedModel(model.eval(), _kv_identity(model.config, base), folder)


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
    return LoadedModel(packed, _kv_identity(model.config, base), folder)


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
    path = chain_path(folder, chain)
    header = _read_header(path, chain)
    _check_base(path, header, base)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _check_digest(path, header, _digest(tensors, tensors.__getitem__))
    slots = dict(chain_tensors(model, chain))
    unread = set() if model.head is not None else _HEAD_TENSORS
    if foreign := sorted(tensors.keys() - slots.keys() - unread):
        raise CheckpointError(f"{path}: tensor {foreign[0]} has no place in the config's model")
    for name, parameter in slots.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        found, expected = tuple(tensors[name].shape), tuple(parameter.shape)
        if found != expected:
            raise CheckpointError(f"{path}: tensor {name} has shape {found}, expected {expected}")
        tensor = runtime_order(name, model.config, chain, tensors[name])
        _assign(model, chain, name, tensor.to(device=device, dtype=dtype).contiguous())


def _check_base(path: Path, header: Mapping[str, str], base: str) -> None:
    if header["base"] != base:
        raise CheckpointError(
            f"{path}: belongs to another model: it was trained on a chain 1 with digest "
            f"{header['base']}, this folder's chain 1 has {base}"
        )


def _read_header(path: Path, chain: int) -> Mapping[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; chain {chain} is missing") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not safetensors: {error}") from error
    if header.get("format") != _FORMAT or header.get("chain") != str(chain):
        raise CheckpointError(
            f"{path}: not chain {chain} of a CoLM checkpoint: its header says "
            f"format {header.get('format')!r}, chain {header.get('chain')!r}; "
            f"expected {_FORMAT!r}, {str(chain)!r}"
        )
    for key in ("digest", "base"):
        if key not in header:
            raise CheckpointError(f"{path}: damaged: its header lacks {key!r}")
    return header


def _check_digest(path: Path, header: Mapping[str, str], found: str) -> None:
    if found != header["digest"]:
        raise CheckpointError(f"{path}: damaged: its content does not match its digest")


def _digest(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    digest = ContentDigest()
    for name in sorted(names):
        tensor = read(name).contiguous()
        digest.begin(name, tensor.dtype, tensor.shape)
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
