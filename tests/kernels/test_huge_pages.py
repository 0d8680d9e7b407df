from __future__ import annotations

import pytest
import torch

from colm_serve.kernels import huge_pages


@pytest.mark.parametrize("shape", [(3,), (5, 7), (1024, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_zeros_start_at_a_cache_line_and_keep_what_is_written(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = huge_pages.zeros(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.data_ptr() % 64 == 0
    assert not tensor.any()
    tensor.fill_(1)
    assert tensor.all()
