"""Limits of the quantisation kernels."""

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.quant import triton_impl as kernels

CASES = tuple(
    Case(
        f"rows {x} {'pow2' if pow2 else 'plain'}",
        kernels.rows_kernel,
        {
            "x_ptr": f"*{x}",
            "value_ptr": "*fp8e4nv",
            "scale_ptr": "*fp32",
            "M": "i32",
            "K": "i32",
            "KP": "i32",
        },
        {"POW2": pow2, "R": kernels.ROWS},
        kernels.ROWS_LAUNCH,
        ("x_ptr", "value_ptr", "scale_ptr", "M", "K", "KP"),
        Limits(registers=64, shared=1024, needs={"LDG.E.128": 1, "STG.E.128": 1}),
    )
    for x in ("bf16", "fp32")
    for pow2 in (False, True)
)
