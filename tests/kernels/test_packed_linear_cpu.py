"""The packed kernel against the plain staircase."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colm_serve.kernels.packed_linear_cpu import Epilogue, Matrix, PackedLinear
from colm_serve.kernels.staircase_linear import staircase_linear
from colm_serve.kernels.tile_cpu import TILE_ROWS

IN_DIMS, OUT_DIMS = (16, 24, 40), (40, 8, 33)
RAGGED = (11, 5, 2)


def staircase(dtype: torch.dtype, epilogue: Epilogue) -> tuple[PackedLinear, list[Tensor]]:
    torch.manual_seed(0)
    columns = [0, *accumulate(OUT_DIMS)]
    shapes = list(zip(accumulate(IN_DIMS), columns, OUT_DIMS, strict=False))
    packed = PackedLinear(
        [Matrix(i, 0, width, column, out) for i, (width, column, out) in enumerate(shapes)],
        dtype,
        epilogue,
    )
    weights = [torch.randn(out, width) / width**0.5 for width, _, out in shapes]
    for i, weight in enumerate(weights):
        packed.set(i, weight, weight.flip(0) if epilogue is Epilogue.SWIGLU else None)
    return packed, weights


def compute(
    packed: PackedLinear, x_TD: Tensor, num_rows: tuple[int, ...], threads: int = 2
) -> Tensor:
    y_TO = torch.ones(x_TD.shape[0], sum(OUT_DIMS))
    counts = np.array(num_rows)
    packed(x_TD.numpy(), y_TO.numpy(), np.zeros_like(counts), counts, threads)
    return y_TO


def expect(
    x_TD: Tensor, weights: list[Tensor], num_rows: tuple[int, ...], epilogue: Epilogue
) -> Tensor:
    sums = staircase_linear(x_TD, weights, num_rows)
    if epilogue is Epilogue.SWIGLU:
        gated = staircase_linear(x_TD, [weight.flip(0) for weight in weights], num_rows)
        values = F.silu(sums) * gated
    else:
        values = F.gelu(sums) if epilogue is Epilogue.GELU else sums
    y_TO = torch.ones(x_TD.shape[0], sum(OUT_DIMS))
    for rows, column, out in zip(num_rows, [0, *accumulate(OUT_DIMS)], OUT_DIMS, strict=False):
        columns = slice(column, column + out)
        before = y_TO[:rows, columns] if epilogue is Epilogue.ADD else 0
        y_TO[:rows, columns] = values[:rows, columns] + before
    return y_TO


@pytest.mark.parametrize("epilogue", Epilogue)
@pytest.mark.parametrize("num_rows", [(1, 1, 1), RAGGED, (3, 0, 0), (20,), (TILE_ROWS + 1,) * 3])
def test_it_is_the_staircase(num_rows: tuple[int, ...], epilogue: Epilogue) -> None:
    packed, weights = staircase(torch.float32, epilogue)
    x_TD = torch.randn(num_rows[0], sum(IN_DIMS))
    actual, expected = compute(packed, x_TD, num_rows), expect(x_TD, weights, num_rows, epilogue)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epilogue", Epilogue)
def test_bfloat16_weights_are_exact_for_values_that_bfloat16_has(epilogue: Epilogue) -> None:
    packed, weights = staircase(torch.bfloat16, epilogue)
    rounded = [weight.bfloat16().float() for weight in weights]
    x_TD = torch.randn(RAGGED[0], sum(IN_DIMS))
    expected = expect(x_TD, rounded, RAGGED, epilogue)
    torch.testing.assert_close(compute(packed, x_TD, RAGGED), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epilogue", Epilogue)
def test_int8_weights_err_by_less_than_half_a_step_of_each_output_s_scale(
    epilogue: Epilogue,
) -> None:
    packed, weights = staircase(torch.int8, epilogue)
    rounded = []
    for weight in weights:
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        rounded.append((weight / step).round() * step)
        assert ((rounded[-1] - weight).abs() <= step * 0.5001).all()
    x_TD = torch.randn(RAGGED[0], sum(IN_DIMS))
    expected = expect(x_TD, rounded, RAGGED, epilogue)
    torch.testing.assert_close(compute(packed, x_TD, RAGGED), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_has_the_same_bits_in_any_batch_on_any_number_of_threads(dtype: torch.dtype) -> None:
    packed, _ = staircase(dtype, Epilogue.SWIGLU)
    x_TD = torch.randn(13, sum(IN_DIMS))
    together = compute(packed, x_TD, (13, 13, 13), threads=3)
    for row in range(13):
        alone = compute(packed, x_TD[row : row + 1].clone(), (1, 1, 1), threads=1)
        assert torch.equal(alone[0], together[row])


def test_a_small_dtype_takes_less_memory() -> None:
    sizes = [
        PackedLinear([Matrix(0, 0, 256, 0, 64)], dtype).num_bytes
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    ]
    assert sizes == [65536, 32768, 16384 + 64 * 4]


def test_rows_before_the_first_are_left_alone() -> None:
    packed, weights = staircase(torch.float32, Epilogue.STORE)
    x_TD, y_TO = torch.randn(6, sum(IN_DIMS)), torch.ones(6, sum(OUT_DIMS))
    packed(x_TD.numpy(), y_TO.numpy(), np.array([2]), np.array([5]), 2)
    expected = torch.ones_like(y_TO)
    expected[2:5, : OUT_DIMS[0]] = F.linear(x_TD[2:5, : IN_DIMS[0]], weights[0])
    torch.testing.assert_close(y_TO, expected, rtol=1e-5, atol=1e-5)
