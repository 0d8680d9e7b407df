"""Chain-of-Linear on a CPU at the speed of its memory: packed weights, one tile kernel.

A decode step of few rows reads every active weight once and does little with it, so the weights
are laid out in the order in which they are read: blocks of 32 outputs, and in a block the 32
weights of one input after another. One tile multiplies such a block with up to 8 rows while their
sums stay in registers; a mixed batch gives each chain the tiles of the rows that reach it. Any
element of the result is one sum in the order of its inputs, so it does not depend on which other
rows are in the batch.

Shapes: T rows (tokens), D input width, O output width.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from colm_serve.kernels import huge_pages
from colm_serve.kernels.jit_cpu import kernel
from colm_serve.kernels.math_cpu import sigmoid
from colm_serve.kernels.tile_cpu import BLOCK, LANES, TILE_ROWS, linear_tile

# Starting numba's threads sets the calling thread's number of OpenMP threads, which is torch's too.
_num_threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(_num_threads)


class Epilogue(enum.IntEnum):
    """What becomes of a sum."""

    STORE = 0
    ADD = 1  # to what is there: a residual, or a head's lower chains
    SWIGLU = 2  # a block holds 16 outputs of the gate, then the 16 they are to gate
    GELU = 3


# As plain numbers, for compiled code.
_STORE, _ADD, _SWIGLU = (int(e) for e in (Epilogue.STORE, Epilogue.ADD, Epilogue.SWIGLU))


@dataclass(frozen=True)
class Matrix:
    """Where one matrix stands in a `PackedLinear`, and what it connects."""

    chain: int
    in_column: int
    in_width: int
    out_column: int
    out_width: int


class PackedArrays(NamedTuple):
    """What the kernel reads of a `PackedLinear`."""

    weights_L: np.ndarray
    scales_L: np.ndarray
    jobs: np.ndarray
    epilogue: int


class PackedLinear:
    """The matrices of one step of the model, the same for each layer, in one buffer.

    Args:
        matrices: where each reads and writes; several may belong to one chain.
        dtype: how weights are stored: float32, bfloat16 (exact for checkpoints in bfloat16) or
            int8 with a scale an output. Sums are fp32 always.
        epilogue: see `Epilogue`; under SWIGLU a matrix is set as its gate and its other half.
        num_layers: how many times over.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        dtype: torch.dtype = torch.float32,
        epilogue: Epilogue = Epilogue.STORE,
        num_layers: int = 1,
    ) -> None:
        self._matrices = tuple(matrices)
        self._outputs_per_block = LANES if epilogue is Epilogue.SWIGLU else BLOCK
        blocks = [-(-m.out_width // self._outputs_per_block) for m in matrices]
        sizes = [count * BLOCK * m.in_width for count, m in zip(blocks, matrices, strict=True)]
        num_scales = sum(blocks) * BLOCK if dtype is torch.int8 else 0
        self._weights = huge_pages.zeros((num_layers, sum(sizes)), dtype)
        self._scales = torch.ones(num_layers, num_scales)
        first_weight, first_block = [0, *accumulate(sizes)], [0, *accumulate(blocks)]
        jobs = [
            (m.chain, m.in_column, m.in_width, m.out_column, m.out_width, weight, block)
            for m, weight, block in zip(matrices, first_weight, first_block, strict=False)
        ]
        bits = self._weights.view(torch.uint16) if dtype is torch.bfloat16 else self._weights
        self.arrays = PackedArrays(
            bits.numpy(), self._scales.numpy(), np.array(jobs, dtype=np.int64), int(epilogue)
        )

    @property
    def num_bytes(self) -> int:
        """Memory that the weights take."""
        return self._weights.nbytes + self._scales.nbytes

    def set(
        self, index: int, weight_OD: Tensor, gated_OD: Tensor | None = None, *, layer: int = 0
    ) -> None:
        """Pack a matrix into its place.

        Args:
            index: of `matrices`.
            weight_OD: [O, D]; under SWIGLU the gate's.
            gated_OD: [O, D], under SWIGLU only: what the gate's outputs multiply.
        """
        matrix = self._matrices[index]
        halves = [weight_OD] if gated_OD is None else [weight_OD, gated_OD]
        per_half = self._outputs_per_block
        num_blocks = -(-matrix.out_width // per_half)
        packed = torch.zeros(num_blocks, len(halves), per_half, matrix.in_width)
        for i, half in enumerate(halves):
            padded = torch.zeros(num_blocks * per_half, matrix.in_width)
            padded[: matrix.out_width] = half
            packed[:, i] = padded.view(num_blocks, per_half, -1)
        rows = packed.view(num_blocks, BLOCK, matrix.in_width)
        first_weight, first_block = self.arrays.jobs[index, 5:]
        if self._scales.numel():
            scales = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
            self._scales[layer, first_block * BLOCK :][: scales.numel()] = scales.flatten()
            rows = (rows / scales).round()
        flat = rows.transpose(1, 2).flatten()
        if self._weights.dtype is torch.bfloat16:
            flat = _interleave(flat)
        self._weights[layer, first_weight:][: flat.numel()] = flat

    def __call__(
        self,
        x_TD: np.ndarray,
        y_TO: np.ndarray,
        first_rows: np.ndarray,
        end_rows: np.ndarray,
        num_threads: int,
        layer: int = 0,
    ) -> None:
        """Compute a layer's matrices; see `multiply`."""
        multiply(self.arrays, layer, x_TD, y_TO, first_rows, end_rows, num_threads)


def _interleave(packed: Tensor) -> Tensor:
    """Neighbours in memory are the outputs j and 16 + j, which are loaded as one 32-bit number."""
    return packed.view(-1, 2, LANES).transpose(1, 2).flatten()


@kernel()
def multiply(linear, layer, x_TD, y_TO, first_rows, end_rows, num_threads):
    """Compute into `y_TO` the rows [first_rows[i], end_rows[i]) of every matrix of chain i.

    Args:
        linear: `PackedArrays`.
        x_TD: fp32, rows contiguous; rows sorted by level, highest first.
        y_TO: fp32; only the columns and rows named are written.
        first_rows: int64, an entry for each active chain.
        end_rows: int64, as many; chains beyond are not computed.
        num_threads: among which the outputs are shared out.
    """
    _multiply(
        linear.weights_L[layer], linear.scales_L[layer], linear.jobs, x_TD, y_TO, first_rows,
        end_rows, linear.epilogue, num_threads,
    )  # fmt: skip


# No fastmath: it lets one copy of an unrolled loop round otherwise than the next, and then a row's
# bits depend on its place in the batch.
@kernel(parallel=True)
def _multiply(
    weights, scales, jobs, x_TD, y_TO, first_rows, end_rows, epilogue, num_threads
):  # fmt: skip
    per_block = LANES if epilogue == _SWIGLU else BLOCK
    for thread in prange(num_threads):
        sums = np.empty(TILE_ROWS * BLOCK, np.float32)
        for job in range(len(jobs)):
            chain, in_column, in_width, out_column, out_width, first_weight, first_block = jobs[job]
            if chain >= len(end_rows):
                continue
            num_blocks = (out_width + per_block - 1) // per_block
            # Every job is shared out the same way, so ADD follows the STORE of the same thread.
            for block in range(
                num_blocks * thread // num_threads, num_blocks * (thread + 1) // num_threads
            ):
                offset = first_weight + block * BLOCK * in_width
                for row in range(first_rows[chain], end_rows[chain], TILE_ROWS):
                    num_rows = min(TILE_ROWS, end_rows[chain] - row)
                    linear_tile(weights, offset, x_TD, row, in_column, in_width, num_rows, sums)
                    if len(scales):
                        for i in range(num_rows):
                            for j in range(BLOCK):
                                sums[i * BLOCK + j] *= scales[(first_block + block) * BLOCK + j]
                    column = out_column + block * per_block
                    width = min(per_block, out_width - block * per_block)
                    _finish(sums, y_TO, row, num_rows, column, width, epilogue)


@kernel()
def _finish(sums, y_TO, row, num_rows, column, width, epilogue):
    for i in range(num_rows):
        y = y_TO[row + i]
        first = i * BLOCK
        if epilogue == _STORE:
            for j in range(width):
                y[column + j] = sums[first + j]
        elif epilogue == _ADD:
            for j in range(width):
                y[column + j] += sums[first + j]
        elif epilogue == _SWIGLU:
            for j in range(width):
                gate = sums[first + j]
                y[column + j] = gate * sigmoid(gate) * sums[first + LANES + j]
        else:
            for j in range(width):
                value = sums[first + j]
                y[column + j] = 0.5 * value * (1 + math.erf(value * math.sqrt(0.5)))
