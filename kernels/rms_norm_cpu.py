"""Per-chain RMSNorm on a CPU, into a buffer of the caller's.

Shapes: T rows (tokens), D model width.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(parallel=True, fastmath=True, nogil=True, cache=True, error_model="numpy")
def chain_rms_norm(x_TD, gains_D, first_columns, end_rows, eps, out_TD, num_threads):
    """As `kernels.rms_norm.chain_rms_norm`; what a row's level lacks is left as it was.

    Args:
        x_TD: fp32, rows sorted by level, highest first.
        gains_D: the chains' gains, one after the other.
        first_columns: int64, where each chain begins, and where the last one ends.
        end_rows: int64, rows that chain i touches; an entry for each active chain.
        num_threads: among which the rows are shared out.
    """
    for thread in prange(num_threads):
        for chain in range(len(end_rows)):
            first, end = first_columns[chain], first_columns[chain + 1]
            num_rows = end_rows[chain]
            for row in range(
                num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads
            ):
                x = x_TD[row]
                total = np.float32(0)
                for i in range(first, end):
                    total += x[i] * x[i]
                scale = np.float32(1) / np.sqrt(total / np.float32(end - first) + np.float32(eps))
                out = out_TD[row]
                for i in range(first, end):
                    out[i] = x[i] * scale * gains_D[i]
