"""Limits of the SwiGLU kernels, for BF16 and for FP8 that is dequantised as it is loaded."""

from typing import Any

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.swiglu import kernels
from deepseek_kernels.swiglu import triton_impl as launches

_X = {
    "bf16": {"x_ptr": "*bf16", "weight_ptr": "*fp32"},
    "e4m3": {"x_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "weight_ptr": "*fp32"},
}
_TILES = {"value_ptr": "*fp8e4nv", "y_scale_ptr": "*fp32"}
_DY = {"dy_ptr": "*bf16", "part_ptr": "*fp32"}
_SQUARE = _DY | {
    "value_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "turned_ptr": "*fp8e4nv", "column_scale_ptr": "*fp32",
}  # fmt: skip


def _case(
    name: str, x: str, kernel: Any, pointers: dict[str, str], sizes: str, constants: dict[str, Any],
    launch: dict[str, int], limits: Limits,
) -> Case:  # fmt: skip
    pointers = _X[x] | pointers
    absent = {"scale_ptr": None} if x == "bf16" and "scale_ptr" in kernel.arg_names else {}
    numbers = dict.fromkeys(sizes.split(), "i32")
    return Case(
        f"{name} {x}", kernel, pointers | numbers, absent | constants, launch, (*pointers, *numbers), limits
    )


_R = {"R": launches.ROWS}
_BYTES = ("STS.U8", "LDS.U8")  # what is turned goes through shared memory in words
_WIDE = {"LDG.E.128": 4, "STG.E.128": 2}
CASES = (
    _case("forward", "bf16", kernels.forward_kernel, {"y_ptr": "*bf16"}, "M F S", _R,
          launches.ROWS_LAUNCH, Limits(64, 0, _WIDE)),
    *(
        _case("rows", x, kernels.rows_kernel, _TILES, "M F S FP",
              {"R": launches.QUANTISE_ROWS, "WHOLE": True, "POW2": True},
              launches.QUANTISE_LAUNCH, Limits(64, 4096, {"LDG.E.128": loads, "STG.E.128": 2}))
        for x, loads in (("bf16", 8), ("e4m3", 4))
    ),
    *(
        _case("columns", x, kernels.columns_kernel, _TILES, "M F S MP",
              {"C": launches.CHANNELS, "WHOLE": True, "POW2": False},
              launches.COLUMNS_LAUNCH, Limits(128, 16384, {"LDG.E.128": loads, "STG.E.128": 4}, _BYTES))
        for x, loads in (("bf16", 16), ("e4m3", 8))
    ),
    *(
        _case("backward", x, kernels.backward_kernel, _DY | {"dx_ptr": "*bf16"}, "M F S", _R | {"WHOLE": True},
              launches.ROWS_LAUNCH, Limits(96, 4096, {"LDG.E.128": loads, "STG.E.128": 4}))
        for x, loads in (("bf16", 6), ("e4m3", 4))
    ),
    *(
        _case("backward and quantise", x, kernels.backward_quantise_kernel, _SQUARE, "M F S MP",
              {"POW2": True, "VECTOR": vector, "SPLIT": launches.SPLIT}, launches.SQUARE_LAUNCH,
              Limits(128, 16384, {"LDG.E.128": loads, "STG.E.128": 4}, _BYTES))
        for x, vector, loads in (("bf16", 8, 40), ("e4m3", 16, 28))
    ),
)  # fmt: skip
