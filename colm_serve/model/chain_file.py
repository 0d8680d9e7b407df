"""One chain's file: safetensors with a header that says whose chain it is, and a digest of it.

The header carries the digest of the file's content and that of the chain-1 file it was trained
on; a file that is missing, truncated, damaged or of another model is refused by its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from colm_serve.errors import CheckpointError
from colm_serve.files import writing
from colm_serve.model.content_digest import content_digest

_FORMAT = "colm-chain-1"


def chain_path(folder: Path, chain: int) -> Path:
    """The file of chain `chain`, counted from 1."""
    return folder / f"chain-{chain}.safetensors"


def chain_digest(folder: Path, chain: int) -> str:
    """The content digest that a chain's file says it has; contents are not read."""
    return read_header(chain_path(folder, chain), chain)["digest"]


def write_chain(
    folder: Path, chain: int, tensors: Mapping[str, Tensor], base: str | None = None
) -> str:
    """Write a chain's file and return its content digest.

    Args:
        folder: must be there.
        chain: counted from 1.
        tensors: by stored name, query heads in the config's order.
        base: digest of the chain 1 it belongs to; None for chain 1 itself.

    Raises:
        WriteFailed: as on a full disk.
    """
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = content_digest(stored, stored.__getitem__)
    path = chain_path(folder, chain)
    with writing(path):
        save_file(stored, path, chain_header(chain, digest, base))
    path.chmod(0o644)  # safetensors would keep it to its owner
    return digest


def chain_header(chain: int, digest: str, base: str | None = None) -> dict[str, str]:
    """What a chain's file says of itself; `write_chain` explains the arguments."""
    return {"format": _FORMAT, "chain": str(chain), "digest": digest, "base": base or digest}


def read_chain(folder: Path, chain: int, base: str) -> dict[str, Tensor]:
    """All of a chain's tensors by stored name, checked against the file's digest.

    Args:
        base: digest of the chain 1 that it has to belong to.

    Raises:
        CheckpointError: the file is missing, truncated, damaged or of another model.
    """
    path = chain_path(folder, chain)
    header = read_header(path, chain)
    check_base(path, header, base)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _check_digest(path, header, content_digest(tensors, tensors.__getitem__))
    return tensors


def read_tensor(folder: Path, chain: int, name: str) -> Tensor:
    """One tensor of a chain's file by its stored name; the digest is not checked.

    Raises:
        CheckpointError: the file is missing or truncated, or has no such tensor.
    """
    path = chain_path(folder, chain)
    read_header(path, chain)
    with safe_open(path, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118
            raise CheckpointError(f"{path}: tensor {name} is missing")
        tensor: Tensor = file.get_tensor(name)
    return tensor


def read_shapes(folder: Path, chain: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a chain's tensors by stored name; contents are not read.

    Raises:
        CheckpointError: the file is missing or truncated.
    """
    path = chain_path(folder, chain)
    read_header(path, chain)
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_chain(folder: Path, chain: int) -> list[str]:
    """Check a chain's content against its digest, a tensor at a time; returns the stored names.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    path = chain_path(folder, chain)
    header = read_header(path, chain)
    with safe_open(path, framework="pt") as file:
        names: list[str] = sorted(file.keys())
    _check_digest(path, header, content_digest(names, partial(read_tensor, folder, chain)))
    return names


def read_header(path: Path, chain: int) -> Mapping[str, str]:
    """What the file says of itself; raises CheckpointError where it is not that chain's."""
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


def check_base(path: Path, header: Mapping[str, str], base: str) -> None:
    """Raise CheckpointError unless a chain belongs to the chain 1 of this digest."""
    if header["base"] != base:
        raise CheckpointError(
            f"{path}: belongs to another model: it was trained on a chain 1 with digest "
            f"{header['base']}, this folder's chain 1 has {base}"
        )


def _check_digest(path: Path, header: Mapping[str, str], found: str) -> None:
    if found != header["digest"]:
        raise CheckpointError(f"{path}: damaged: its content does not match its digest")
