"""The interpreter accepts what a GPU would not: the kernels must also compile for one."""

from __future__ import annotations

import os
import subprocess
import sys


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu"],
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 12
