"""Safetensors files written one tensor at a time, so that a model need not fit into memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from colm_serve.files import writing
from colm_serve.model.content_digest import ContentDigest

#: Called with the bytes written so far and those there will be.
Report = Callable[[int, int], None]

#: The stored dtypes that models are made of, by the format's names.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PART_BYTES = 16 * 2**20
_UNKNOWN_DIGEST = "0" * 32


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    make_metadata: Callable[[str], Mapping[str, str]],
    report: Report | None = None,
) -> None:
    """Write a safetensors file, holding one tensor at a time.

    Args:
        path: created, or replaced.
        specs: the tensors, by name.
        read: a tensor by its name; asked for once each.
        make_metadata: what the header says beside the tensors, given their content's digest;
            of one length for every digest.
        report: told of the progress.

    Raises:
        WriteFailed: as on a full disk.
    """
    starts = _layout(specs)
    num_total = sum(spec.num_bytes for spec in specs.values())
    num_written = 0
    digest = ContentDigest()
    with writing(path), path.open("wb") as file:
        header = _header(specs, starts, make_metadata(_UNKNOWN_DIGEST))
        file.write(header)
        for name in sorted(specs):
            digest.begin(name, specs[name].dtype, specs[name].shape)
            file.seek(len(header) + starts[name])
            for part in _parts(read(name)):
                digest.update(part)
                file.write(part)
                num_written += len(part)
                if report is not None:
                    report(num_written, num_total)
        # The digest stands before what it is of: its place was kept.
        file.seek(0)
        file.write(_header(specs, starts, make_metadata(digest.hexdigest())))


def _layout(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Where each tensor's bytes begin; wide dtypes first, so that all are aligned."""
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    ends = accumulate((specs[name].num_bytes for name in order), initial=0)
    return dict(zip(order, ends, strict=False))


def _header(
    specs: Mapping[str, TensorSpec], starts: Mapping[str, int], metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, start in starts.items():
        spec = specs[name]
        entries[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.num_bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    for start in range(0, len(data), _PART_BYTES):
        yield data[start : start + _PART_BYTES]
