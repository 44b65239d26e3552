"""Limits of the quantisation kernels, and that they move 16 bytes at a time."""

from typing import Any

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.quant import column_kernels as columns
from deepseek_kernels.quant import e5m6_kernels as e5m6
from deepseek_kernels.quant import row_kernels as rows

_WIDE = {"LDG.E.128": 1, "STG.E.128": 1}


def _case(
    name: str, kernel: Any, types: str, constants: dict[str, Any], launch: dict[str, int], limits: Limits
) -> Case:
    """``types``: of the pointers, in order; what is left of the arguments are sizes, all divisible by 16."""
    arguments = [one for one in kernel.arg_names if one not in constants]
    pointers = [f"*{one}" for one in types.split()]
    signature = dict(zip(arguments, pointers + ["i32"] * (len(arguments) - len(pointers)), strict=True))
    return Case(name, kernel, signature, constants, launch, tuple(arguments), limits)


CASES = (
    *(
        _case(
            f"rows {x} {'pow2' if pow2 else 'plain'}",
            rows.rows_kernel,
            f"{x} fp8e4nv fp32",
            {"POW2": pow2, "R": rows.ROWS},
            rows.ROWS_LAUNCH,
            Limits(64, 8192, _WIDE),
        )
        for x in ("bf16", "fp32")
        for pow2 in (False, True)
    ),
    *(
        _case(
            f"columns {x}",
            columns.columns_kernel,
            f"{x} fp8e4nv fp32",
            {"POW2": True, "C": columns.COLUMNS},
            columns.COLUMNS_LAUNCH,
            Limits(64, 16384, _WIDE),
        )
        for x in ("bf16", "fp32")
    ),
    *(
        _case(
            f"both {x}",
            columns.both_kernel,
            f"{x} fp8e4nv fp32 fp8e4nv fp32",
            {"POW2": True},
            columns.BOTH_LAUNCH,
            Limits(128, 32768, _WIDE),
        )
        for x in ("bf16", "fp32")
    ),
    _case(
        "requantise columns",
        columns.requantise_kernel,
        "fp8e4nv fp32 fp8e4nv fp32",
        {"POW2": True, "C": columns.REQUANTISE},
        columns.REQUANTISE_LAUNCH,
        Limits(64, 16384, _WIDE),
    ),
    *(
        _case(
            f"blocks {w}",
            rows.blocks_kernel,
            f"{w} fp8e4nv fp32",
            {"POW2": True},
            rows.BLOCKS_LAUNCH,
            Limits(128, 16384, _WIDE),
        )
        for w in ("bf16", "fp32")
    ),
    _case(
        "transpose",
        columns.transpose_kernel,
        "u8 i32",
        {"C": columns.TRANSPOSE},
        columns.TRANSPOSE_LAUNCH,
        Limits(64, 32768, _WIDE),
    ),
    *(
        _case(
            f"dequantise {y}",
            rows.dequantise_kernel,
            f"fp8e4nv fp32 {y}",
            {"R": rows.ROWS},
            rows.DEQUANTISE_LAUNCH,
            Limits(64, 16384, _WIDE),
        )
        for y in ("bf16", "fp32")
    ),
    *(
        _case(
            f"pack {x}",
            e5m6.pack_kernel,
            f"{x} i32 fp32",
            {"R": e5m6.ROWS},
            e5m6.PACK_LAUNCH,
            Limits(64, 16384, _WIDE),
        )
        for x in ("bf16", "fp32")
    ),
    *(
        _case(
            f"unpack {y}",
            e5m6.unpack_kernel,
            f"i32 fp32 {y}",
            {"R": e5m6.ROWS},
            e5m6.UNPACK_LAUNCH,
            Limits(64, 16384, {"STG.E.128": 1}),
        )
        for y in ("bf16", "fp32")
    ),
)
