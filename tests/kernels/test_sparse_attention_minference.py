"""What MInference's kernel is called with: a stand-in follows its signature and its reading.

The package cannot be installed without a GPU's compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from colm_serve import kernels
from colm_serve.kernels import dispatch
from colm_serve.kernels.sparse_attention import attend_sparse
from tests.kernels.test_sparse_attention import make_index, make_qkv


def _triton_mixed_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, block_count: Tensor, block_offset: Tensor,
    column_count: Tensor, column_index: Tensor, sm_scale: float, block_size_M: int = 64,
    block_size_N: int = 64,
) -> Tensor:  # fmt: skip
    """[1, heads, padded tokens, head dim]; blocks are causal, columns are not masked."""
    out = torch.full_like(q, float("nan"))
    for head in range(q.shape[1]):
        for block in range(q.shape[2] // block_size_M):
            rows = torch.arange(block * block_size_M, (block + 1) * block_size_M)
            firsts = block_offset[0, head, block, : block_count[0, head, block]]
            columns = column_index[0, head, block, : column_count[0, head, block]]
            keys = (firsts[:, None] + torch.arange(block_size_N)).flatten()
            mask = torch.cat([keys <= rows[:, None], torch.ones(64, len(columns)).bool()], dim=1)
            keys = torch.cat([keys, columns]).long()
            scores = q[0, head, rows].float() @ k[0, head, keys].float().T * sm_scale
            p = scores.masked_fill(~mask, float("-inf")).softmax(1)
            out[0, head, rows] = (p @ v[0, head, keys].float()).to(q.dtype)
    return out


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module over the stand-in, as dispatch finds it."""
    kernel = ModuleType("minference.ops.pit_sparse_flash_attention_v2")
    setattr(kernel, _triton_mixed_sparse_attention.__name__, _triton_mixed_sparse_attention)
    for module in (ModuleType("minference"), ModuleType("minference.ops"), kernel):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    dispatch._minference.cache_clear()
    found = dispatch._minference()
    assert found is not None
    yield found
    del sys.modules[found.__name__]
    delattr(kernels, "sparse_attention_minference")
    dispatch._minference.cache_clear()


def test_a_span_amid_a_sequence_is_as_the_reference(adapter: ModuleType) -> None:
    q_TQH, k_SNH, v_SNH = (t.half() for t in make_qkv(100, 228))
    index = make_index(
        [
            [([1, 2], []), ([3], [0, 5, 70])],
            [([2], [3]), ([0, 2, 3], [])],
            [([0, 1, 2], []), ([3], list(range(128)))],
            [([2], []), ([3], [])],
        ]
    )
    assert adapter.can_attend(q_TQH, k_SNH)
    out = adapter.attend_sparse(q_TQH, k_SNH, v_SNH, index)
    expected = attend_sparse(q_TQH, k_SNH, v_SNH, index)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)


def test_what_its_kernel_does_not_take_is_left_to_ours(adapter: ModuleType) -> None:
    q_TQH, k_SNH, _ = (t.half() for t in make_qkv(100, 228))
    assert not adapter.can_attend(q_TQH.float(), k_SNH.float())
    assert not adapter.can_attend(q_TQH[:99], k_SNH), "its blocks of rows begin elsewhere"
    assert not adapter.can_attend(q_TQH[..., :12], k_SNH[..., :12])


def test_without_the_package_there_is_none() -> None:
    assert dispatch._minference() is None
