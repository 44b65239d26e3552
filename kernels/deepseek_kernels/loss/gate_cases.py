"""Limits of the cross-entropy kernel. 1024 threads can have 64 registers."""

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.loss import triton_impl as kernels

CASES = tuple(
    Case(
        f"cross entropy {x}",
        kernels.cross_entropy_kernel,
        {
            "logit_ptr": f"*{x}",
            "label_ptr": "*i64",
            "scale_ptr": "*fp32",
            "loss_ptr": "*fp32",
            "V": "i32",
        },
        {"BLOCK": kernels.BLOCK},
        kernels.LAUNCH,
        ("logit_ptr", "label_ptr", "scale_ptr", "loss_ptr", "V"),
        Limits(registers=64, shared=256, needs={"LDG.E.128": 2 * wide, "STG.E.128": wide}),
    )
    for x, wide in (("bf16", 2), ("fp32", 4))
)
