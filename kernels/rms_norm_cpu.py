"""Per-chain RMSNorm on a CPU, into a buffer of the caller's.

Shapes: T rows (tokens), D model width.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from colm_serve.kernels.jit_cpu import kernel

#: Fewer rows than this are not worth waking other threads for.
_FEW_ROWS = 16


@kernel()
def chain_rms_norm(x_TD, gains_D, first_columns, end_rows, eps, out_TD, num_threads):
    """As `kernels.rms_norm.chain_rms_norm`; what a row's level lacks is left as it was.

    Args:
        x_TD: fp32, rows sorted by level, highest first.
        gains_D: the chains' gains, one after the other.
        first_columns: int64, where each chain begins, and where the last one ends.
        end_rows: int64, rows that chain i touches; an entry for each active chain.
        num_threads: among which many rows are shared out.
    """
    if end_rows[0] < _FEW_ROWS:
        _norm_share(x_TD, gains_D, first_columns, end_rows, eps, out_TD, 0, 1)
    else:
        _norm_all(x_TD, gains_D, first_columns, end_rows, eps, out_TD, num_threads)


@kernel(parallel=True, fastmath=True)
def _norm_all(x_TD, gains_D, first_columns, end_rows, eps, out_TD, num_threads):
    for thread in prange(num_threads):
        _norm_share(x_TD, gains_D, first_columns, end_rows, eps, out_TD, thread, num_threads)


@kernel(fastmath=True)
def _norm_share(x_TD, gains_D, first_columns, end_rows, eps, out_TD, share, num_shares):
    for chain in range(len(end_rows)):
        first, end = first_columns[chain], first_columns[chain + 1]
        num_rows = end_rows[chain]
        for row in range(num_rows * share // num_shares, num_rows * (share + 1) // num_shares):
            x, out = x_TD[row, first:end], out_TD[row, first:end]
            total = np.float32(0)
            for i in range(len(x)):
                total += x[i] * x[i]
            scale = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
            gains = gains_D[first:end]
            for i in range(len(x)):
                out[i] = x[i] * scale * gains[i]
