"""How a head's keys are chosen: MInference's patterns.

Shapes: T rows of a span, S tokens with keys, H head dim, R the last rows, B query blocks, J key
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from colm_serve.engine.sparse.head_keys import BlockGrid, HeadKeys
from colm_serve.kernels.sparse_attention import BLOCK

#: Queries at the end of a span by which a vertical-slash head's keys are estimated.
NUM_LAST_QUERIES = 64
#: Columns and slashes that are kept whatever the estimate says: attention sinks and neighbours.
NUM_FIRST_COLUMNS, NUM_LAST_SLASHES = 30, 100


class Selector(Protocol):
    """Chooses the keys of one head."""

    def select(self, q_TH: Tensor, k_SH: Tensor, grid: BlockGrid) -> HeadKeys:
        """For rotated queries and keys; a row's own position need not be among the choice."""


@dataclass(frozen=True)
class Dense:
    """Every key."""

    def select(self, q_TH: Tensor, k_SH: Tensor, grid: BlockGrid) -> HeadKeys:
        return HeadKeys.of_blocks(grid.causal_BJ)


@dataclass(frozen=True)
class AShape:
    """The first `num_first` positions and the `num_local` up to each row's own."""

    num_first: int
    num_local: int

    def select(self, q_TH: Tensor, k_SH: Tensor, grid: BlockGrid) -> HeadKeys:
        columns = np.arange(min(self.num_first, grid.stop))
        return HeadKeys(grid.slash_blocks(np.arange(min(self.num_local, grid.stop))), columns)


@dataclass(frozen=True)
class VerticalSlash:
    """The columns and diagonals on which the last queries' attention mass lies.

    The columns and slashes that are always kept count among `num_verticals` and `num_slashes`.
    The estimate scores 64 rows a span against every key: chunks of 2,048 tokens or more keep that
    small beside the attention itself.
    """

    num_verticals: int
    num_slashes: int

    def select(self, q_TH: Tensor, k_SH: Tensor, grid: BlockGrid) -> HeadKeys:
        verticals_S, slashes_S = last_query_mass(q_TH[-NUM_LAST_QUERIES:], k_SH)
        columns = _largest(verticals_S, self.num_verticals, NUM_FIRST_COLUMNS)
        offsets = _largest(slashes_S, self.num_slashes, NUM_LAST_SLASHES)
        return HeadKeys(grid.slash_blocks(offsets), np.sort(columns))


@dataclass(frozen=True)
class BlockSparse:
    """The `num_blocks` key blocks whose mean key each query block's mean query scores highest."""

    num_blocks: int

    def select(self, q_TH: Tensor, k_SH: Tensor, grid: BlockGrid) -> HeadKeys:
        scores_BJ = _block_means(q_TH) @ _block_means(k_SH).T
        causal_BJ = torch.from_numpy(grid.causal_BJ).to(scores_BJ.device)
        scores_BJ = scores_BJ.masked_fill(~causal_BJ, float("-inf"))
        chosen = scores_BJ.topk(min(self.num_blocks, grid.num_key_blocks)).indices
        blocks_BJ = torch.zeros_like(causal_BJ).scatter_(1, chosen, True)
        return HeadKeys.of_blocks(blocks_BJ.cpu().numpy())


def last_query_mass(q_RH: Tensor, k_SH: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mass of the last R of S rows by column, and by distance from row to key.

    Returns:
        [S] by position of the key, and [S] by how far before its row the key stands.
    """
    num_rows, num_tokens = q_RH.shape[0], k_SH.shape[0]
    padded = q_RH.new_zeros((num_rows, num_rows - 1 + num_tokens), dtype=torch.float32)
    scores_RS = padded[:, num_rows - 1 :]
    q_RH = q_RH.float() * q_RH.shape[1] ** -0.5
    torch.matmul(q_RH, k_SH.contiguous().float().T, out=scores_RS)
    future = torch.ones((num_rows, num_rows), dtype=torch.bool, device=q_RH.device).triu_(1)
    scores_RS[:, -num_rows:].masked_fill_(future, float("-inf"))
    # A softmax in place whose division is part of the sums: it costs what its memory does.
    scores_RS.sub_(scores_RS.amax(dim=1, keepdim=True)).exp_()
    weights_R = scores_RS.sum(dim=1).reciprocal()
    diagonals = padded.as_strided((num_rows, num_tokens), (padded.stride(0) + 1, 1))
    return weights_R @ scores_RS, (weights_R @ diagonals).flip(0)


def _largest(mass_S: Tensor, count: int, num_always: int) -> np.ndarray:
    """Places of the `count` largest; the first `num_always` are always among them."""
    mass_S[:num_always] = float("inf")
    count = min(max(count, num_always), len(mass_S))
    places: np.ndarray = mass_S.topk(count, sorted=False).indices.cpu().numpy()
    return places


def _block_means(x_TH: Tensor) -> Tensor:
    """[blocks, H]; the last block may be short."""
    num_whole = len(x_TH) // BLOCK * BLOCK
    means: Tensor = x_TH[:num_whole].unflatten(0, (-1, BLOCK)).mean(dim=1)
    if num_whole == len(x_TH):
        return means
    return torch.cat([means, x_TH[num_whole:].mean(dim=0, keepdim=True)])
