"""Chain-of-Linear: the reference against the paper, the Triton kernel against the reference."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_serve.kernels import staircase_linear, staircase_linear_triton

IN_DIMS, OUT_DIMS = (24, 16, 64), (16, 33, 70)
ROWS = [(5, 5, 5), (5, 3, 0), (40, 40, 7), (1, 1, 1), (1, 0, 0), (33, 20), (35,)]


def make_case(
    rows: tuple[int, ...], dtype: torch.dtype, in_dims: tuple[int, ...] = IN_DIMS,
    out_dims: tuple[int, ...] = OUT_DIMS,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    torch.manual_seed(sum(rows))
    widths = list(accumulate(in_dims))
    weights = [
        torch.randn(o, k).div(k**0.5).to(dtype) for o, k in zip(out_dims, widths, strict=True)
    ]
    biases = [torch.randn(o).to(dtype) for o in out_dims]
    return torch.randn(rows[0], widths[-1]).to(dtype), weights, biases


def algorithm_1(x: Tensor, weights: list[Tensor], level: int) -> Tensor:
    """The paper's Algorithm 1: every row at one level, columns put together with cat."""
    return torch.cat([F.linear(x[..., : w.shape[1]], w) for w in weights[:level]], dim=-1)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_reference_is_algorithm_1_when_all_rows_have_one_level(level: int) -> None:
    x, weights, _ = make_case((6,) * 3, torch.float32)
    y = staircase_linear.staircase_linear(x, weights, (6,) * level)
    torch.testing.assert_close(y, algorithm_1(x, weights, level))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_reference_gives_each_row_its_own_level_and_zero_beyond(
    rows: tuple[int, ...], has_bias: bool
) -> None:
    x, weights, biases = make_case(rows, torch.float32)
    y = staircase_linear.staircase_linear(x, weights, rows, biases if has_bias else None)
    for row in range(rows[0]):
        level = sum(count > row for count in rows)
        expected = algorithm_1(x[row], weights, level)
        if has_bias:
            expected = expected + torch.cat(biases[:level])
        torch.testing.assert_close(y[row, : len(expected)], expected)
        assert not y[row, len(expected) :].any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_kernel_equals_reference(
    rows: tuple[int, ...], has_bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    x, weights, biases = make_case(rows, dtype)
    check_kernel(x, weights, rows, biases if has_bias else None, tolerance)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_kernel_equals_reference_for_any_staircase(data: st.DataObject) -> None:
    num_chains = data.draw(st.integers(1, 4))
    sizes = st.tuples(*[st.integers(1, 70)] * num_chains)
    in_dims, out_dims = data.draw(sizes), data.draw(sizes)
    counts = data.draw(st.lists(st.integers(0, 40), min_size=num_chains, max_size=num_chains))
    rows = tuple(sorted(counts, reverse=True))
    x, weights, biases = make_case(rows, torch.float32, in_dims, out_dims)
    check_kernel(x, weights, rows, biases, 1e-6)


def test_kernel_reads_strided_rows_and_zeroes_rows_beyond_every_chain() -> None:
    rows = (40, 20, 7)
    x, weights, biases = make_case(rows, torch.float32)
    wider = F.pad(x, (0, 5, 0, 3))
    check_kernel(wider[:, : x.shape[1]], weights, rows, biases, 1e-6)


def test_weights_at_odd_addresses_are_not_read_in_wide_words() -> None:
    _, weights, _ = make_case((5, 5, 5), torch.float32, (16, 16, 32))
    assert staircase_linear_triton._is_aligned(weights)
    shifted = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w) for w in weights]
    assert not staircase_linear_triton._is_aligned(shifted)
    assert not staircase_linear_triton._is_aligned([torch.zeros(16, 24)])


def test_kernel_refuses_what_it_would_read_as_garbage() -> None:
    x, weights, biases = make_case((5, 5, 5), torch.float32)
    for bad_x, bad_weights, rows, message in (
        (x.half(), weights, (5, 5, 5), "weights are torch.float32, rows are torch.float16"),
        (x[:, :-1], weights, (5, 5, 5), "103 columns, weights read 104"),
        (x, weights, (6, 5, 5), "5 rows, chain 1 touches 6"),
        (x, [w.t().contiguous().t() for w in weights], (5, 5, 5), "row by row"),
        (x.t().contiguous().t(), weights, (5, 5, 5), "rows are contiguous"),
    ):
        with pytest.raises(AssertionError, match=message):
            staircase_linear_triton.staircase_linear(bad_x, bad_weights, rows)
    with pytest.raises(AssertionError, match=r"weights are torch\.float64"):
        staircase_linear_triton.staircase_linear(
            x, weights, (5, 5, 5), [b.double() for b in biases]
        )


def poison_unread(x: Tensor, weights: list[Tensor], rows: tuple[int, ...]) -> Tensor:
    """NaN in every input that no output of the staircase depends on."""
    x = x.clone() if x.is_contiguous() else x
    x[rows[0] :] = float("nan")
    for weight, count in zip(weights, (*rows[1:], 0), strict=False):
        x[count:, weight.shape[1] :] = float("nan")
    return x


def check_kernel(
    x: Tensor,
    weights: list[Tensor],
    rows: tuple[int, ...],
    biases: list[Tensor] | None,
    tolerance: float,
) -> None:
    x = poison_unread(x, weights, rows)
    width = sum(w.shape[0] for w in weights[: len(rows)])
    poisoned = torch.full((x.shape[0], width), float("nan"), dtype=x.dtype)
    y = staircase_linear_triton.staircase_linear(x, weights, rows, biases, out=poisoned).double()
    with torch.no_grad():
        expected = staircase_linear.staircase_linear(
            x.double(), [w.double() for w in weights], rows, biases and [b.double() for b in biases]
        )
    assert (y - expected).norm() <= tolerance * expected.norm()
