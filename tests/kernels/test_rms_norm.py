"""Per-chain RMSNorm: the reference against its definition, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_serve.kernels import rms_norm, rms_norm_autograd, rms_norm_triton

DIMS = (24, 16, 64)
ROWS = [(5, 5, 5), (5, 3, 0), (1, 1, 1), (7, 2), (6,)]
EPS = 1e-5


def make_case(
    rows: tuple[int, ...], dtype: torch.dtype, dims: tuple[int, ...] = DIMS
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(sum(rows))
    x = torch.randn(rows[0], sum(dims)).mul(3).to(dtype)
    return x, [torch.randn(d).to(dtype) for d in dims]


@pytest.mark.parametrize("rows", ROWS)
def test_reference_normalises_each_chain_by_itself(rows: tuple[int, ...]) -> None:
    x, weights = make_case(rows, torch.float32)
    y = rms_norm.chain_rms_norm(x, weights, rows, EPS)
    start = 0
    for weight, count in zip(weights, rows, strict=False):
        columns = slice(start, start := start + len(weight))
        expected = torch.nn.functional.rms_norm(x[:count, columns], weight.shape, weight, EPS)
        torch.testing.assert_close(y[:count, columns], expected)
        assert not y[count:, columns].any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_are_those_of_autograd(
    rows: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    outputs, gradients = [], []
    for function in (rms_norm_autograd.chain_rms_norm, rms_norm.chain_rms_norm):
        x, weights = make_case(rows, dtype)
        # A row and a column that no chain touches.
        wider = torch.nn.functional.pad(x, (0, 1, 0, 1), value=1.0)
        leaves = [tensor.requires_grad_() for tensor in (wider, *weights)]
        y = function(wider, weights, rows, EPS)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))
        outputs.append(y)
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_kernel_equals_reference(
    rows: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    check_kernel(*make_case(rows, dtype), rows, tolerance)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_kernel_equals_reference_for_any_staircase(data: st.DataObject) -> None:
    num_chains = data.draw(st.integers(1, 4))
    dims = data.draw(st.tuples(*[st.integers(1, 100)] * num_chains))
    counts = data.draw(st.lists(st.integers(0, 6), min_size=num_chains, max_size=num_chains))
    rows = tuple(sorted(counts, reverse=True))
    check_kernel(*make_case(rows, torch.float32, dims), rows, 1e-6)


def test_kernel_reads_strided_rows_and_zeroes_rows_beyond_every_chain() -> None:
    x, weights = make_case((7, 4, 2), torch.float32)
    wider = torch.nn.functional.pad(x, (0, 5, 0, 3))
    check_kernel(wider[:, : x.shape[1]], weights, (7, 4, 2), 1e-6)


def test_kernel_refuses_what_it_would_read_as_garbage() -> None:
    x, weights = make_case((5, 5, 5), torch.float32)
    for bad_x, message in (
        (x.half(), "weights are torch.float32, rows are torch.float16"),
        (x[:, :-1], "103 columns, gains for 104"),
        (x.t().contiguous().t(), "rows are contiguous"),
    ):
        with pytest.raises(AssertionError, match=message):
            rms_norm_triton.chain_rms_norm(bad_x, weights, (5, 5, 5), EPS)


def poison_unread(x: Tensor, weights: list[Tensor], rows: tuple[int, ...]) -> Tensor:
    """NaN in every input that no output of the staircase depends on."""
    x = x.clone() if x.is_contiguous() else x
    start = 0
    for weight, count in zip(weights, rows, strict=False):
        x[count:, start : start + len(weight)] = float("nan")
        start += len(weight)
    x[:, start:] = float("nan")
    return x


def check_kernel(x: Tensor, weights: list[Tensor], rows: tuple[int, ...], tolerance: float) -> None:
    x = poison_unread(x, weights, rows)
    width = sum(len(w) for w in weights[: len(rows)])
    poisoned = torch.full((x.shape[0], width), float("nan"), dtype=x.dtype)
    y = rms_norm_triton.chain_rms_norm(x, weights, rows, EPS, out=poisoned).float()
    expected = rms_norm.chain_rms_norm(x.float(), [w.float() for w in weights], rows, EPS)
    assert (y - expected).norm() <= tolerance * expected.norm()
