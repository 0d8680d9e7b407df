"""One chain's file: safetensors with a header that says whose chain it is, and a digest of it.

The header carries the digest of the file's content and that of the chain-1 file it was trained
on; a file that is missing, truncated, damaged or of another model is refused by its path.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from colm_serve.errors import CheckpointError
from colm_serve.files import writing
from colm_serve.model.content_digest import content_digest

CHAIN_FILE = re.compile(r"chain-([1-9][0-9]*)\.safetensors")
_FORMAT = "colm-chain-1"


@dataclass(frozen=True)
class ChainFile:
    """A chain's file as its model folder knows it: nothing is read of any other.

    Each method opens the file anew, for it may have been replaced, and raises CheckpointError
    where it is missing, truncated, or not the chain of these digests.

    Attributes:
        chain: counted from 1.
        digest: of the content.
        base: digest of the chain 1 that it was trained on.
    """

    path: Path
    chain: int
    digest: str
    base: str

    def check_header(self) -> None:
        """Look whether it is the file meant; its content is not read."""
        with self._open():
            pass

    def check_content(self) -> list[str]:
        """Check the content against the digest, a tensor at a time; returns the stored names.

        Raises:
            CheckpointError: it is damaged.
        """
        with self._open() as file:
            names: list[str] = sorted(file.keys())
        self._check_digest(content_digest(names, self.read_tensor))
        return names

    def read(self) -> dict[str, Tensor]:
        """All tensors by stored name, checked against the digest.

        Raises:
            CheckpointError: it is damaged.
        """
        with self._open() as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._check_digest(content_digest(tensors, tensors.__getitem__))
        return tensors

    def read_tensor(self, name: str) -> Tensor:
        """One tensor by its stored name; the content is not checked against the digest.

        Raises:
            CheckpointError: there is no such tensor.
        """
        with self._open() as file:
            if name not in file.keys():  # noqa: SIM118
                raise CheckpointError(f"{self.path}: tensor {name} is missing")
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by stored name; the content is not read."""
        with self._open() as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def copy_to(self, folder: Path) -> ChainFile:
        """Copy it, byte for byte, to another folder; the content is not checked."""
        copy = chain_path(folder, self.chain)
        shutil.copyfile(self.path, copy)
        self._check_header(read_header(copy, self.chain))
        return ChainFile(copy, self.chain, self.digest, self.base)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with _opened(self.path, self.chain) as (file, header):
            self._check_header(header)
            yield file

    def _check_header(self, header: Mapping[str, str]) -> None:
        if header["digest"] != self.digest:
            raise CheckpointError(
                f"{self.path}: of another save: its digest is {header['digest']}, and that of "
                f"this folder's chain {self.chain} is {self.digest}; if the folder was being "
                "written, load it again, and else copy or write all of it anew (or, if the file "
                f"belongs there: `colm seal {self.path.parent}`)"
            )
        if header["base"] != self.base:
            raise CheckpointError(
                f"{self.path}: belongs to another model: it was trained on a chain 1 with digest "
                f"{header['base']}, this folder's chain 1 has {self.base}"
            )

    def _check_digest(self, found: str) -> None:
        if found != self.digest:
            raise CheckpointError(f"{self.path}: damaged: its content does not match its digest")


def chain_path(folder: Path, chain: int) -> Path:
    """The file of chain `chain`, counted from 1."""
    return folder / f"chain-{chain}.safetensors"


def write_chain(
    folder: Path, chain: int, tensors: Mapping[str, Tensor], base: str | None = None
) -> ChainFile:
    """Write a chain's file.

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
    return ChainFile(path, chain, digest, base or digest)


def chain_header(chain: int, digest: str, base: str | None = None) -> dict[str, str]:
    """What a chain's file says of itself; `write_chain` explains the arguments."""
    return {"format": _FORMAT, "chain": str(chain), "digest": digest, "base": base or digest}


def read_header(path: Path, chain: int) -> Mapping[str, str]:
    """What the file says of itself; raises CheckpointError where it is not that chain's."""
    with _opened(path, chain) as (_, header):
        return header


@contextmanager
def _opened(path: Path, chain: int) -> Iterator[tuple[Any, Mapping[str, str]]]:
    """A chain's file, opened, and its header."""
    with ExitStack() as held:
        try:
            # safetensors opens a path twice, for the header and for the tensors: of one file here,
            # whatever takes its place in between.
            opened = held.enter_context(path.open("rb"))
            file: Any = safe_open(f"/proc/self/fd/{opened.fileno()}", framework="pt")
            held.enter_context(file)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; chain {chain} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or not safetensors: {error}") from error
        header: Mapping[str, str] = file.metadata() or {}
        _check_is_chain(path, header, chain)
        yield file, header


def _check_is_chain(path: Path, header: Mapping[str, str], chain: int) -> None:
    if header.get("format") != _FORMAT or header.get("chain") != str(chain):
        raise CheckpointError(
            f"{path}: not chain {chain} of a CoLM checkpoint: its header says "
            f"format {header.get('format')!r}, chain {header.get('chain')!r}; "
            f"expected {_FORMAT!r}, {str(chain)!r}"
        )
    for key in ("digest", "base"):
        if key not in header:
            raise CheckpointError(f"{path}: damaged: its header lacks {key!r}")
