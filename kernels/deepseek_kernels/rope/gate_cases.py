"""Limits of the rotary kernel, at V3's 64 channels: for the queries of 128 heads, and the one key of all."""

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.rope import triton_impl as kernels

_STRIDES = ("stride_b", "stride_t", "stride_h")
CASES = tuple(
    Case(
        f"rotate {x} {heads} head{'s' * (heads > 1)}{' inverse' * inverse}",
        kernels.rotate_kernel,
        {
            "x_ptr": f"*{x}",
            "turn_ptr": "*fp32",
            "T": "i32",
            "H": "i32",
            **dict.fromkeys(_STRIDES, "i32"),
        },
        {
            "INVERSE": inverse,
            "SIZE": 64,
            "SIZE_P": 64,
            "POSITIONS": kernels.ROWS // heads,
            "HEADS": heads,
        },
        kernels.LAUNCH,
        ("x_ptr", "turn_ptr", "T", *_STRIDES),
        Limits(registers=64, shared=0, needs={"LDG.E.128": 6, "STG.E.128": 2}),
    )
    for x in ("bf16", "fp32")
    for heads in (kernels.ROWS, 1)
    for inverse in (False, True)
)
