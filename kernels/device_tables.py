"""Small constant tables on the device, made once: launches are too short to upload them anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def pointers(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """[n] int64 addresses of contiguous tensors of `like`'s dtype and device, on that device.

    A kernel reads through them unchecked, so another dtype would be read as garbage.
    """
    for tensor in tensors:
        assert tensor.is_contiguous(), "a kernel addresses weights row by row"
        assert tensor.dtype == like.dtype, f"weights are {tensor.dtype}, rows are {like.dtype}"
        assert tensor.device == like.device, f"weights on {tensor.device}, rows on {like.device}"
    return int_table(tuple(t.data_ptr() for t in tensors), like.device, torch.int64)


@lru_cache(maxsize=4096)
def int_table(
    values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """[n] integers on the device; the same tensor for the same values."""
    return torch.tensor(values, dtype=dtype, device=device)
