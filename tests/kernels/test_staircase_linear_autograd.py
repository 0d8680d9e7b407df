"""Chain-of-Linear's gradients against autograd's own, and what is not computed of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from colm_serve.kernels.staircase_linear_autograd import staircase_linear

WIDTHS, OUT_DIMS = (2, 3, 6), (2, 4, 1)
ROWS = [(3, 3, 3), (3, 2, 1), (3, 3, 0), (3, 2), (2,)]


def make_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Three rows of seven columns, of which the last is read by no chain."""
    torch.manual_seed(0)
    weights = [torch.randn(o, k, dtype=dtype) for o, k in zip(OUT_DIMS, WIDTHS, strict=True)]
    biases = [torch.randn(o, dtype=dtype) for o in OUT_DIMS]
    leaves = (torch.randn(3, 7, dtype=dtype), *weights, *biases)
    x, *parameters = (leaf.requires_grad_() for leaf in leaves)
    return x, parameters[:3], parameters[3:]


def plain(x: Tensor, weights: list[Tensor], rows: tuple[int, ...], biases: list[Tensor]) -> Tensor:
    """The paper's Algorithm 1 with rows that end, differentiated by autograd alone."""
    parts = [
        F.pad(F.linear(x[:count, : w.shape[1]], w, b), (0, 0, 0, len(x) - count))
        for w, b, count in zip(weights, biases, rows, strict=False)
    ]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_are_those_of_finite_differences(rows: tuple[int, ...], has_bias: bool) -> None:
    x, weights, biases = make_case()
    used = (*weights[: len(rows)], *(biases[: len(rows)] if has_bias else ()))

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[: len(rows)], parameters[len(rows) :]
        return staircase_linear(x, weights, rows, biases or None)

    assert torch.autograd.gradcheck(run, (x, *used))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_output_and_gradients_are_those_of_autograd(
    rows: tuple[int, ...], is_autocast: bool
) -> None:
    outputs, gradients = [], []
    for function in (staircase_linear, plain):
        x, weights, biases = make_case(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            y = function(x, weights, rows, biases)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        outputs.append(y)
        gradients.append([leaf.grad for leaf in (x, *weights, *biases)])
    assert outputs[0].dtype == (torch.bfloat16 if is_autocast else torch.float32)
    tolerance = 0.05 if is_autocast else 1e-5
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def num_flops(x: Tensor, weights: list[Tensor], num_frozen: int = 0) -> int:
    """Multiplications and additions of the backward pass."""
    y = staircase_linear(x, weights, (3, 3, 3), num_frozen=num_frozen)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    return int(counter.get_total_flops())


def test_only_the_staircase_is_computed_and_only_what_is_asked_for() -> None:
    x, weights, _ = make_case()
    num_weights = sum(weight.numel() for weight in weights)
    assert num_flops(x, weights) == 2 * 2 * 3 * num_weights
    assert num_flops(x.detach(), weights) == 2 * 3 * num_weights
    assert num_flops(x, [weight.detach() for weight in weights]) == 2 * 3 * num_weights


@pytest.mark.parametrize("num_frozen", [1, 2])
def test_frozen_chains_take_no_gradient_to_their_inputs(num_frozen: int) -> None:
    x, weights, _ = make_case()
    frozen, trained = [w.detach() for w in weights[:num_frozen]], weights[num_frozen:]
    first = frozen[-1].shape[1]
    expected = 2 * 3 * sum(w.numel() + w[:, first:].numel() for w in trained)
    assert num_flops(x, [*frozen, *trained], num_frozen) == expected
    assert x.grad is not None
    assert not x.grad[:, :first].any()
    through_all = torch.autograd.grad(staircase_linear(x, weights, (3, 3, 3)).sum(), x)[0]
    torch.testing.assert_close(x.grad[:, first:], through_all[:, first:])


def test_where_every_chain_is_frozen_there_is_nothing_to_differentiate() -> None:
    x, weights, _ = make_case()
    frozen = [weight.detach() for weight in weights]
    assert not staircase_linear(x, frozen, (3, 3, 3), num_frozen=3).requires_grad
