"""Limits of the RMSNorm kernels at V3's widths: hidden 7168, latents 1536 and 512. With quantisation, 256 shared bytes
are those of the tile scales: a row that changed its layout would show as thousands."""

import triton

from deepseek_kernels.formats import TILE
from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.norm import triton_impl as kernels


def _norm(d: int, quantise: bool, limits: Limits) -> Case:
    tiles = triton.next_power_of_2(d // TILE)
    pointers = {"x_ptr": "*bf16", "gain_ptr": "*bf16", "y_ptr": "*bf16", "scale_ptr": "*fp32"}
    if quantise:
        pointers |= {"value_ptr": "*fp8e4nv", "tile_scale_ptr": "*fp32"}
    return Case(
        f"norm {d}{' and quantise' if quantise else ''}",
        kernels.norm_kernel,
        pointers | {"M": "i32", "D": "i32", "KP": "i32", "eps": "fp32"},
        ({} if quantise else {"value_ptr": None, "tile_scale_ptr": None})
        | {"G": tiles, "VECTOR": kernels.vector_of(2, d), "QUANTISE": quantise, "POW2": quantise},
        kernels.row_launch(tiles),
        (*pointers, "M", "D", "KP"),
        limits,
    )


def _backward(d: int, limits: Limits) -> Case:
    tiles = triton.next_power_of_2(d // TILE)
    pointers = {
        "dy_ptr": "*bf16",
        "x_ptr": "*bf16",
        "scale_ptr": "*fp32",
        "gain_ptr": "*bf16",
        "dx_ptr": "*bf16",
    }
    return Case(
        f"backward {d}",
        kernels.backward_kernel,
        pointers | {"D": "i32"},
        {"G": tiles},
        kernels.row_launch(tiles),
        (*pointers, "D"),
        limits,
    )


_GAIN = {"dy_ptr": "*bf16", "x_ptr": "*bf16", "scale_ptr": "*fp32", "part_ptr": "*fp32"}
CASES = (
    _norm(7168, False, Limits(64, 128, {"LDG.E.128": 8, "STG.E.128": 4})),
    _norm(1536, False, Limits(64, 128, {"LDG.E.128": 8, "STG.E.128": 4})),
    _norm(512, False, Limits(64, 128, {"LDG.E.128": 4, "STG.E.128": 2})),
    _norm(7168, True, Limits(80, 256, {"LDG.E.128": 8, "STG.E.128": 4, "STG.E.64": 4})),
    _backward(7168, Limits(96, 128, {"LDG.E.128": 12, "STG.E.128": 4})),
    _backward(512, Limits(96, 128, {"LDG.E.128": 6, "STG.E.128": 2})),
    Case(
        "gain gradient",
        kernels.gain_kernel,
        _GAIN | {"M": "i32", "D": "i32"},
        {"PART": kernels.PART, "STEP": kernels.STEP, "CHANNELS": kernels.CHANNELS},
        kernels.SUM_LAUNCH,
        (*_GAIN, "M", "D"),
        Limits(96, 8192, {"LDG.E.128": 4}),
    ),
    Case(
        "gain gradient, adding up",
        kernels.add_kernel,
        {"part_ptr": "*fp32", "into_ptr": "*fp32", "P": "i32", "D": "i32"},
        {},
        kernels.ADD_LAUNCH,
        ("part_ptr", "into_ptr", "P", "D"),
        Limits(64, 8192, {"LDG.E.128": 4}),
    ),
)  # fmt: skip
