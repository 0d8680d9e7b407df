"""The tensors of a Hugging Face folder, in one safetensors file or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from colm_serve.convert.tensor_file import DTYPES, TensorSpec
from colm_serve.errors import CheckpointError
from colm_serve.json_file import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HfCheckpoint:
    """Names and shapes of all tensors, and their content one by one.

    Attributes:
        specs: the tensors that are there.
        contents: the file that says which: the only one, or the shards' index.

    Raises:
        CheckpointError: the folder has no safetensors, one is missing, truncated or damaged, or
            lacks a tensor that the index says it has; or a tensor is not of floats.
    """

    def __init__(self, folder: Path) -> None:
        single = folder / SINGLE_FILE
        self.contents = single if single.exists() else folder / INDEX_FILE
        self.specs: dict[str, TensorSpec] = {}
        self._paths: dict[str, Path] = {}
        for path, indexed in _tensor_files(self.contents).items():
            with _open(path) as file:
                specs = {name: _spec(path, name, file) for name in file.keys()}  # noqa: SIM118
            if missing := sorted(indexed - specs.keys()):
                raise CheckpointError(
                    f"{path}: tensor {missing[0]} is missing; {INDEX_FILE} says it is here"
                )
            self.specs |= specs
            self._paths |= dict.fromkeys(specs, path)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._paths[name]

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, mapped from its file."""
        # What has been read stays mapped for as long as its file is open.
        with _open(self._paths[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _spec(path: Path, name: str, file: Any) -> TensorSpec:
    entry = file.get_slice(name)
    dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} is stored as {dtype}; expected one of {', '.join(DTYPES)}"
        )
    return TensorSpec(DTYPES[dtype], shape)


def _tensor_files(contents: Path) -> dict[Path, set[str]]:
    """The files, each with the tensors that the index says it has; one file has no index."""
    if contents.name == SINGLE_FILE:
        return {contents: set()}
    folder = contents.parent
    if not contents.exists():
        raise CheckpointError(
            f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read"
        )
    files: dict[Path, set[str]] = {}
    for name, file_name in _weight_map(contents).items():
        files.setdefault(folder / file_name, set()).add(name)
    return files


def _weight_map(index: Path) -> dict[str, str]:
    weight_map: dict[str, str] = read_json(index).get("weight_map", dict)
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: weight_map: tensor {name} is in {file_name!r}, which is no file name"
            )
    return weight_map


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {INDEX_FILE} names it") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not safetensors: {error}") from error
