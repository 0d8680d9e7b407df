"""Per-chain RMSNorm for training: its backward pass writes each chain's columns once.

Shapes: T rows (tokens), D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colm_serve.kernels import rms_norm as reference


def chain_rms_norm(
    x_TD: Tensor, weights: Sequence[Tensor], num_rows: Sequence[int], eps: float
) -> Tensor:
    """As `kernels.rms_norm.chain_rms_norm`, differentiable once."""
    active = weights[: len(num_rows)]
    y_TD: Tensor = _ChainRMSNorm.apply(tuple(num_rows), eps, x_TD, *active)  # type: ignore[no-untyped-call]
    return y_TD


class _ChainRMSNorm(torch.autograd.Function):
    """Inputs: rows of each chain, epsilon, x, a gain a chain."""

    @staticmethod
    def forward(
        ctx: Any, num_rows: tuple[int, ...], eps: float, x_TD: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.num_rows, ctx.eps = num_rows, eps
        ctx.save_for_backward(x_TD, *weights)
        return reference.chain_rms_norm(x_TD, weights, num_rows, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        x_grad_TD = torch.zeros_like(x_TD)
        weight_grads = []
        start = 0
        for weight, rows in zip(weights, ctx.num_rows, strict=True):
            place = slice(rows), slice(start, start + len(weight))
            start += len(weight)
            x_grad, weight_grad = _gradients(x_TD[place], weight, grad_TD[place], ctx.eps)
            x_grad_TD[place] = x_grad
            weight_grads.append(weight_grad)
        return None, None, x_grad_TD, *weight_grads


def _gradients(x_TD: Tensor, weight: Tensor, grad_TD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One chain's, to its columns and to its gain, reduced in fp32."""
    x_TD, grad_TD = x_TD.float(), grad_TD.float()
    scale_T1 = torch.rsqrt(x_TD.pow(2).mean(dim=-1, keepdim=True) + eps)
    normed_TD = x_TD * scale_T1
    product_TD = grad_TD * normed_TD
    # Every column of a row moves the scale that all of them share.
    shared_T1 = torch.mv(product_TD, weight.float()).div_(len(weight)).unsqueeze(1)
    x_grad_TD = (grad_TD * weight).addcmul_(normed_TD, shared_T1, value=-1).mul_(scale_T1)
    return x_grad_TD, product_TD.sum(dim=0).to(weight.dtype)
