"""Choose the implementation of each op of a `ColmModel`: Triton on CUDA, else torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from colm_serve.kernels import (
    rms_norm,
    rms_norm_autograd,
    sparse_attention,
    staircase_linear,
    staircase_linear_autograd,
)
from colm_serve.kernels.sparse_attention import SparseIndex


def _use_triton(x: Tensor) -> bool:
    # Where gradients are wanted torch computes: the Triton kernels are forward only.
    return x.is_cuda and not torch.is_grad_enabled()


def chain_linear(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    num_rows: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    num_frozen: int = 0,
) -> Tensor:
    """Chain-of-Linear on the staircase of `num_rows`; see `kernels.staircase_linear`.

    Where gradients are wanted, `num_frozen` is as in `kernels.staircase_linear_autograd`.
    """
    if torch.is_grad_enabled():
        return staircase_linear_autograd.staircase_linear(
            x_TD, weights, num_rows, biases, num_frozen
        )
    if _use_triton(x_TD):
        from colm_serve.kernels.staircase_linear_triton import staircase_linear as on_gpu

        return on_gpu(x_TD, weights, num_rows, biases)
    return staircase_linear.staircase_linear(x_TD, weights, num_rows, biases)


def chain_rms_norm(
    x_TD: Tensor, weights: Sequence[Tensor], num_rows: Sequence[int], eps: float
) -> Tensor:
    """Per-chain RMSNorm on the staircase of `num_rows`; see `kernels.rms_norm`."""
    if torch.is_grad_enabled():
        return rms_norm_autograd.chain_rms_norm(x_TD, weights, num_rows, eps)
    if _use_triton(x_TD):
        from colm_serve.kernels.rms_norm_triton import chain_rms_norm as on_gpu

        return on_gpu(x_TD, weights, num_rows, eps)
    return rms_norm.chain_rms_norm(x_TD, weights, num_rows, eps)


def attend_sparse(q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor, index: SparseIndex) -> Tensor:
    """Attention to the keys of an index; see `kernels.sparse_attention`.

    On CUDA by MInference where that is installed and takes the case, else by our Triton kernel.
    """
    if _use_triton(q_TQH):
        from colm_serve.kernels.sparse_attention_triton import attend_sparse as on_gpu

        minference = _minference()
        if minference is not None and minference.can_attend(q_TQH, k_SNH):
            o_TQH: Tensor = minference.attend_sparse(q_TQH, k_SNH, v_SNH, index)
            return o_TQH
        return on_gpu(q_TQH, k_SNH, v_SNH, index)
    return sparse_attention.attend_sparse(q_TQH, k_SNH, v_SNH, index)


@cache
def _minference() -> ModuleType | None:
    try:
        from colm_serve.kernels import sparse_attention_minference
    except ImportError:
        return None
    return sparse_attention_minference
