"""Chain-of-Linear for training: forward and backward without a copy of input or output.

By autograd alone each chain's part of the input gradient is padded to the full width and added
up, which costs more than the products that the staircase saves. Here every product reads and
writes columns of the tensors as they are.

Shapes: T rows (tokens), D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colm_serve.kernels import staircase_linear as reference


def staircase_linear(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    num_rows: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    num_frozen: int = 0,
) -> Tensor:
    """As `kernels.staircase_linear.staircase_linear`, differentiable once; honours autocast.

    Args:
        num_frozen: the first chains, whose outputs and inputs take no gradient to x.
    """
    num_chains = len(num_rows)
    if num_frozen >= num_chains:
        x_TD = x_TD.detach()
    inputs = (x_TD, *weights[:num_chains], *(biases or ())[:num_chains])
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        inputs = tuple(tensor.to(dtype) for tensor in inputs)
    y_TO: Tensor = _StaircaseLinear.apply(tuple(num_rows), num_frozen, *inputs)  # type: ignore[no-untyped-call]
    return y_TO


class _StaircaseLinear(torch.autograd.Function):
    """Inputs: rows of each chain, frozen chains, x, a weight a chain, a bias a chain or none."""

    @staticmethod
    def forward(
        ctx: Any, num_rows: tuple[int, ...], num_frozen: int, x_TD: Tensor, *parameters: Tensor
    ) -> Tensor:
        weights, biases = parameters[: len(num_rows)], parameters[len(num_rows) :]
        ctx.num_rows, ctx.num_frozen = num_rows, num_frozen
        ctx.save_for_backward(x_TD, *weights)
        return reference.staircase_linear(x_TD, weights, num_rows, biases or None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        _, _, needs_x, *needs = ctx.needs_input_grad
        needs_weights, needs_biases = needs[: len(weights)], needs[len(weights) :]
        columns = grad_TO.split([weight.shape[0] for weight in weights], dim=1)
        grads = [column[:rows] for column, rows in zip(columns, ctx.num_rows, strict=True)]
        return (
            None,
            None,
            _input_gradient(x_TD, weights, grads, ctx.num_frozen) if needs_x else None,
            *(
                grad.t() @ x_TD[: len(grad), : weight.shape[1]] if is_needed else None
                for grad, weight, is_needed in zip(grads, weights, needs_weights, strict=True)
            ),
            *(
                grad.sum(dim=0) if is_needed else None
                for grad, is_needed in zip(grads, needs_biases, strict=False)
            ),
        )


def _input_gradient(
    x_TD: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor], num_frozen: int
) -> Tensor:
    """[T, D]: chain i's product is added to the columns that chain i reads.

    Args:
        grads: of each chain's output, for the rows that it touches.
    """
    begin = weights[num_frozen - 1].shape[1] if num_frozen else 0
    covers_all = (len(grads[-1]), weights[-1].shape[1], begin) == (*x_TD.shape, 0)
    grad_TD = x_TD.new_empty(x_TD.shape) if covers_all else x_TD.new_zeros(x_TD.shape)
    beta = 0 if covers_all else 1
    # The last chain first: it reads the most.
    for grad, weight in zip(grads[num_frozen:][::-1], weights[num_frozen:][::-1], strict=True):
        part = grad_TD[: len(grad), begin : weight.shape[1]]
        torch.addmm(part, grad, weight[:, begin:], beta=beta, out=part)
        beta = 1
    return grad_TD
