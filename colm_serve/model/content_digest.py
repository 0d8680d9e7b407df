"""The digest that a chain's file carries of its content."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash


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
