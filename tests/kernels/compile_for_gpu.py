"""Compile every Triton kernel for Hopper, which needs no GPU; run outside the interpreter."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from colm_serve.kernels import (
    rms_norm_triton,
    sparse_attention_triton,
    staircase_linear_triton,
)
from colm_serve.kernels.staircase_linear_triton import _DECODE, _PREFILL, _PREFILL_FP32

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 227 * 1024


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> None:
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=TARGET, options=options
    )
    assert compiled.metadata.shared <= MAX_SHARED_BYTES, compiled.metadata.shared
    print(kernel.__name__, types[kernel.arg_names[0]], compiled.metadata.shared)


def main() -> None:
    for element in ("fp32", "bf16", "fp16"):
        tables = dict.fromkeys(("weight_ptrs", "bias_ptrs"), "*i64")
        tables |= dict.fromkeys(("tiles_ptr", "num_rows_ptr", "starts_ptr", "widths_ptr"), "*i32")
        types = {"x_ptr": f"*{element}", "y_ptr": f"*{element}", "eps": "fp32", **tables}
        for blocks in (_DECODE, _PREFILL_FP32 if element == "fp32" else _PREFILL):
            compile_kernel(
                staircase_linear_triton._staircase_kernel,
                types,
                {"HAS_BIAS": True, "IS_ALIGNED": True, "BLOCK_M": blocks.m, "BLOCK_N": blocks.n,
                 "BLOCK_K": blocks.k},
                {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages},
            )  # fmt: skip
        compile_kernel(rms_norm_triton._rms_norm_kernel, types, {"BLOCK": 1024}, {})
        pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{element}")
        index = {"block_starts_ptr": "*i64", "key_blocks_ptr": "*i32",
                 "column_starts_ptr": "*i64", "columns_ptr": "*i32"}  # fmt: skip
        compile_kernel(
            sparse_attention_triton._sparse_attention_kernel,
            {**pointers, **index, "scale": "fp32"},
            {"BLOCK": 64, "BLOCK_H": 128},
            {"num_warps": 4, "num_stages": 2},
        )


if __name__ == "__main__":
    main()
