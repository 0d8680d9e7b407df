"""The digest that chain files and checkpoints carry of their content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import xxhash
from torch import Tensor


class ContentDigest:
    """Digest of tensors' names, dtypes, shapes and bytes, wherever in a file they stand.

    Tensors are added in the order of their names, their bytes in as many parts as suit.
    """

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self._state.update(f"{name} {dtype} {tuple(shape)}\n".encode())

    def update(self, data: memoryview) -> None:
        """Add bytes of the tensor that has begun."""
        self._state.update(data)

    def hexdigest(self) -> str:
        """32 characters."""
        return str(self._state.hexdigest())


def content_digest(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """The digest of tensors in memory or in a file; one is read at a time."""
    digest = ContentDigest()
    for name in sorted(names):
        tensor = read(name).contiguous()
        digest.begin(name, tensor.dtype, tensor.shape)
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
