"""How the CPU's kernels are compiled: once a machine, and again when any of them changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


def _cache_folder() -> str:
    # numba looks only at the file of the function it compiles, and would keep using what other
    # files' functions were when they were compiled into it.
    here = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(here.glob("*_cpu.py")))
    return str(here / "__pycache__" / f"kernels-{hashlib.blake2b(sources).hexdigest()[:16]}")


_CACHE_FOLDER = _cache_folder()


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit` that releases the GIL, divides as C does and is cached on disk.

    Args:
        options: more of numba's, such as `parallel` and `fastmath`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        outer, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _CACHE_FOLDER
        try:
            compile_ = numba.njit(nogil=True, cache=True, error_model="numpy", **options)
            compiled: Callable[..., Any] = compile_(function)
            return compiled
        finally:
            numba.config.CACHE_DIR = outer

    return decorate
