"""The Chain-of-Layer building blocks (paper 3.1, 3.2.3, 3.2.4, 3.4).

Every block works on rows sorted by level, highest first: `num_rows[i]` is how many leading rows
chain i touches. One level for all rows is the special case of equal counts.

Shapes: T rows (tokens), D model width, O output width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colm_serve.kernels import dispatch


def init_weight(layer: nn.Module, weight: Tensor) -> None:
    """Give a weight of one of these layers the value that training begins with."""
    if isinstance(layer, ChainLinear):
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    elif isinstance(layer, ChainRMSNorm):
        nn.init.ones_(weight)
    else:
        nn.init.normal_(weight, std=0.02)


def _make_weights(layer: nn.Module, shapes: Iterable[tuple[int, ...]]) -> nn.ParameterList:
    weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
    for weight in weights:
        # A loader builds on the meta device, where initialising does nothing but import 150 MB.
        if not weight.is_meta:
            init_weight(layer, weight)
    return weights


class ChainLinear(nn.Module):
    """y_i = W_i x_{<=i} + b_i for each chain i (equation 1, Algorithm 1).

    `num_frozen` chains, the first ones, take no gradient to their inputs and outputs: where those
    chains are frozen in the whole model, it would end nowhere.
    """

    num_frozen = 0

    def __init__(self, in_dims: Sequence[int], out_dims: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        shapes = zip(out_dims, accumulate(in_dims), strict=True)
        self.weights = _make_weights(self, shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(o)) for o in out_dims if bias)

    def forward(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        """[T, D] to [T, O]; chains beyond `len(num_rows)` are not computed."""
        biases = list(self.biases) or None
        return dispatch.chain_linear(x_TD, list(self.weights), num_rows, biases, self.num_frozen)


class ChainRMSNorm(nn.Module):
    """RMSNorm of each chain's slice by itself (3.2.3, Figure 4)."""

    def __init__(self, chain_dims: Sequence[int], eps: float) -> None:
        super().__init__()
        self.weights = _make_weights(self, ((d,) for d in chain_dims))
        self.eps = eps

    def forward(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        return dispatch.chain_rms_norm(x_TD, list(self.weights), num_rows, self.eps)


class ChainEmbedding(nn.Module):
    """One table a chain: level k reads the first k (3.2.4, Algorithm 6)."""

    def __init__(self, vocab_size: int, chain_dims: Sequence[int]) -> None:
        super().__init__()
        self.weights = _make_weights(self, ((vocab_size, d) for d in chain_dims))

    def forward(self, token_ids_T: Tensor, num_rows: Sequence[int]) -> Tensor:
        """[T] token ids to [T, D]; zero where a row's level lacks the chain."""
        num_total = token_ids_T.shape[0]
        columns = []
        for weight, rows in zip(self.weights, num_rows, strict=False):
            x = F.embedding(token_ids_T[:rows], weight)
            columns.append(x if rows == num_total else F.pad(x, (0, 0, 0, num_total - rows)))
        return torch.cat(columns, dim=-1)


def _score(x_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """[T, V]: one matrix for all rows, by whatever kernel suits it."""
    return dispatch.chain_linear(x_TD, [weight_VD], (x_TD.shape[0],))


class SharedHead(nn.Module):
    """One classifier of which level k uses the first columns: Loss_i's W^i of 3.4.

    The columns of chain i are kept as a matrix of their own, so a mixed batch reads each once
    and a level adds its chains' scores up.
    """

    def __init__(self, vocab_size: int, chain_dims: Sequence[int]) -> None:
        super().__init__()
        self.weights = _make_weights(self, ((vocab_size, d) for d in chain_dims))

    def forward(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        """[T, D] to [T, V], each row scored at its own level."""
        start = 0
        logits_TV: Tensor | None = None
        for weight, rows in zip(self.weights, num_rows, strict=False):
            x = x_TD[:rows, start : start + weight.shape[1]]
            start += weight.shape[1]
            if logits_TV is None:
                logits_TV = _score(x, weight)
            elif torch.is_grad_enabled():
                logits_TV = torch.cat([logits_TV[:rows] + _score(x, weight), logits_TV[rows:]])
            else:
                logits_TV[:rows] += _score(x, weight)
        assert logits_TV is not None, "num_rows names at least one chain"
        return logits_TV

    def all_levels(self, x_TD: Tensor) -> list[Tensor]:
        """Scores of every level of the same rows, [T, V] each, sharing the lower chains' work."""
        logits: list[Tensor] = []
        start = 0
        for weight in self.weights:
            part = _score(x_TD[:, start : start + weight.shape[1]], weight)
            logits.append(part if not logits else logits[-1] + part)
            start += weight.shape[1]
        return logits


class PerLevelHead(nn.Module):
    """A classifier of its own for each level: one matrix [V, D_k] a level."""

    def __init__(self, vocab_size: int, chain_dims: Sequence[int]) -> None:
        super().__init__()
        shapes = ((vocab_size, width) for width in accumulate(chain_dims))
        self.weights = _make_weights(self, shapes)

    def forward(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        """[T, D] to [T, V], each row scored at its own level."""
        ends = [*num_rows[1:], 0]
        parts = [
            _score(x_TD[end:rows, : weight.shape[1]], weight)
            for weight, rows, end in zip(self.weights, num_rows, ends, strict=False)
        ]
        return torch.cat(parts[::-1])

    def all_levels(self, x_TD: Tensor) -> list[Tensor]:
        """Scores of every level of the same rows, [T, V] each."""
        return [_score(x_TD[:, : weight.shape[1]], weight) for weight in self.weights]
