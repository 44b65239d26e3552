"""What ``tune`` tries: kernels with launch constants that only a GPU can choose between, at V3's sizes.

Legend: M rows, D hidden 7168, F expert size 2048.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels import moe, norm, quant, swiglu
from deepseek_kernels.formats import Rows
from deepseek_kernels.moe import triton_gate
from deepseek_kernels.moe import triton_impl as expansion
from deepseek_kernels.norm import triton_impl as norms
from deepseek_kernels.quant import column_kernels, e5m6_kernels
from deepseek_kernels.swiglu import triton_impl as swiglus

D, F = 7168, 2048
FP8 = 1 + 4 / 128  # bytes of a value and its share of a scale
OURS = {"pow2": True, "backend": "triton"}
GAINS = (
    *((part, 4, 512, 4) for part in (64, 256)),
    *((part, 2, 1024, 4) for part in (64, 128)),
    *((64, 4, 1024, 8), (128, 4, 1024, 8), (128, 8, 256, 4)),
)


@dataclass(frozen=True)
class Trial:
    """``constants``: names in ``module``, ``variants``: values for them. That of a launch stands for its number of
    warps."""

    name: str
    moved: float  # bytes
    call: Callable[[], object]
    module: ModuleType
    constants: tuple[str, ...]
    variants: tuple[tuple[Any, ...], ...]

    def present(self) -> tuple[Any, ...]:
        values = (getattr(self.module, name) for name in self.constants)
        return tuple(one["num_warps"] if isinstance(one, dict) else one for one in values)

    def choose(self, variant: tuple[Any, ...]) -> None:
        for name, value in zip(self.constants, variant, strict=True):
            now = getattr(self.module, name)
            setattr(self.module, name, now | {"num_warps": value} if isinstance(now, dict) else value)


def _bf16(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def _swiglu(device: torch.device, kind: str, what: str, m: int, f: int, *variants: tuple[Any, ...]) -> Trial:
    given: Tensor | Rows = _bf16(device, m, 2 * f)
    read = 4.0
    if kind == "FP8":
        given, read = quant.quantise_rows(given, **OURS), 2 * FP8
    weight = torch.rand(m, device=device)
    match what:
        case "backward_quantise":
            call = partial(swiglu.swiglu_backward_quantise, _bf16(device, m, f), given, weight, **OURS)
            constants, moved = ("SPLIT", "SQUARE_LAUNCH"), 2 + read + 4 * FP8
        case "quantise_columns":
            call = partial(swiglu.swiglu_quantise_columns, given, weight, **OURS)
            constants, moved = ("CHANNELS", "COLUMNS_LAUNCH"), read + FP8
        case _:
            call = partial(swiglu.swiglu_quantise, given, weight, **OURS)
            constants, moved = ("QUANTISE_ROWS", "QUANTISE_LAUNCH"), read + FP8
    return Trial(f"swiglu_{what} from {kind}", moved * m * f, call, swiglus, constants, variants)


def _turned(device: torch.device, what: str, m: int, k: int, *variants: tuple[Any, ...]) -> Trial:
    x = _bf16(device, m, k)
    constants = (what.upper(), f"{what.upper()}_LAUNCH")
    match what:
        case "requantise":
            call, moved = partial(quant.requantise_columns, quant.quantise_rows(x, **OURS), **OURS), 2 * FP8
        case "both":
            call, moved = partial(quant.quantise_both, x, **OURS), 2 + 2 * FP8
            constants = ("BOTH_REGISTERS", "BOTH_LAUNCH")
        case "transpose":
            call, moved = (
                partial(quant.transpose_blocks, quant.quantise_blocks(x, **OURS), backend="triton"),
                2,
            )
        case _:
            call, moved = partial(quant.quantise_columns, x, **OURS), 2 + FP8
    return Trial(f"{what} [{m}, {k}]", moved * m * k, call, column_kernels, constants, variants)


def _e5m6(device: torch.device, what: str, m: int, k: int, *variants: tuple[Any, ...]) -> Trial:
    x = _bf16(device, m, k)
    call = partial(quant.pack_e5m6, x, backend="triton")
    if what == "UNPACK":
        call = partial(quant.unpack_e5m6, call(), torch.bfloat16, backend="triton")
    constants, moved = (f"{what}_ROWS", f"{what}_LAUNCH"), (2.5 + FP8) * m * k
    return Trial(f"{what.lower()}_e5m6", moved, call, e5m6_kernels, constants, variants)


def _gain(device: torch.device, m: int, d: int, *variants: tuple[Any, ...]) -> Trial:
    dy, x, scale = _bf16(device, m, d), _bf16(device, m, d), torch.rand(m, device=device)
    into = torch.zeros(d, device=device)

    def call() -> Tensor:
        into.zero_()  # its time is counted
        norm.rms_norm_gain_gradient(dy, x, scale, into, backend="triton")
        return into

    return Trial(
        "gain gradient", 4.0 * m * d, call, norms, ("PART", "STEP", "CHANNELS", "SUM_LAUNCH"), variants
    )


def _gate(device: torch.device, m: int, *variants: tuple[Any, ...]) -> Trial:
    scores, bias = torch.rand(m, 256, device=device), torch.randn(256, device=device) * 0.01
    call = partial(moe.gate, scores, bias, 8, 4, 8, 2.5, backend="triton")
    return Trial("gate", 1120.0 * m, call, triton_gate, ("TOKENS",), variants)


def _expand(device: torch.device, m: int, rows: int, d: int, *variants: tuple[Any, ...]) -> Trial:
    kept = quant.quantise_rows(_bf16(device, m, d), **OURS)
    index = (torch.randperm(rows, device=device) * m // rows).int()
    call = partial(moe.expand_rows, kept, index, **OURS)
    return Trial("expand_rows", FP8 * d * (m + rows), call, expansion, ("BYTES",), variants)


def trials(device: torch.device, shrink: int) -> list[Callable[[], Trial]]:
    """To be made one by one: each has its operands on the device. ``shrink`` divides rows; beyond 8, widths too."""
    m, rows = max(4096 // shrink, 128), max(32768 // shrink, 128)
    d, f = (D, F) if shrink <= 8 else (256, 128)
    on, tiles = partial, (((64, 1), 4), ((128, 1), 8), ((128, 8), 8))
    return [
        on(_swiglu, device, "FP8", "backward_quantise", rows, f, (True, 8), (False, 16), (False, 8)),
        on(_swiglu, device, "BF16", "backward_quantise", rows, f, (True, 8), (False, 16)),
        on(_swiglu, device, "FP8", "quantise_columns", rows, f, (64, 4), (64, 8), (128, 8)),
        on(_swiglu, device, "BF16", "quantise_columns", rows, f, (64, 4), (128, 8)),
        on(_swiglu, device, "FP8", "quantise", rows, f, (32, 4), (16, 4), (32, 8)),
        on(_turned, device, "requantise", rows, d, *tiles[:2], ((64, 8), 4), ((128, 1), 4)),
        on(_turned, device, "both", rows, d, (None, 8), (80, 8), (None, 16)),
        on(_turned, device, "columns", rows, d, *tiles),
        on(_turned, device, "columns", m, d, *tiles),
        on(_turned, device, "transpose", 2 * D if shrink == 1 else 256, d, ((128, 1), 4), ((128, 8), 4)),
        on(_e5m6, device, "PACK", m, 2 * d, (32, 4), (16, 4)),
        on(_e5m6, device, "UNPACK", m, 2 * d, (32, 4), (64, 4), (16, 4)),
        on(_gain, device, m, d, *GAINS),
        on(_gate, device, m, (1,), (2,), (4,)),
        on(_expand, device, m, rows, d, (8,), (16,)),
    ]
