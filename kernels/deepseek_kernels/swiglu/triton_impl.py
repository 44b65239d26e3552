"""SwiGLU: launches of its Triton kernels. Legend: see the package."""

import torch
import triton
from torch import Tensor

from deepseek_kernels.formats import TILE, new_tiles, padded
from deepseek_kernels.quant import quantise_both
from deepseek_kernels.swiglu import kernels

ROWS, ROWS_LAUNCH = 16, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
CHANNELS, COLUMNS_LAUNCH = 64, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
# Wider for what is quantised: most of its instructions are those of a thread, not of an element.
QUANTISE_ROWS, QUANTISE_LAUNCH = 32, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
SPLIT = True  # see backward_quantise_kernel
SQUARE_LAUNCH = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _parts(weight: Tensor | None, like: Tensor, f: int) -> Tensor | None:
    """Where each tile of 128 channels leaves its share of the weight's gradient, [F / 128, M]."""
    return None if weight is None else like.new_empty(triton.cdiv(f, TILE), len(like), dtype=torch.float32)


def _summed(parts: Tensor | None, weight: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if parts is None or weight is None else parts.sum(0).to(weight.dtype)


def swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    gate_up, weight = gate_up.contiguous(), _dense(weight)
    m, f = gate_up.shape[0], gate_up.shape[1] // 2
    y_MF = gate_up.new_empty(m, f)
    if y_MF.numel():
        grid = (triton.cdiv(m, ROWS) * triton.cdiv(f, TILE),)
        kernels.forward_kernel[grid](gate_up, weight, y_MF, m, f, 2 * f, ROWS, **ROWS_LAUNCH)
    return y_MF


def swiglu_quantise(
    gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor]:
    gate_up, scales, weight = gate_up.contiguous(), _dense(scales), _dense(weight)
    (m, stride), f = gate_up.shape, width // 2
    values, y_scales = new_tiles(gate_up, m, f)
    if values.numel():
        grid = (triton.cdiv(m, QUANTISE_ROWS) * triton.cdiv(f, TILE),)
        kernels.rows_kernel[grid](
            gate_up, scales, weight, values, y_scales, m, f, stride, padded(f), QUANTISE_ROWS, f % TILE == 0, pow2,
            **QUANTISE_LAUNCH,
        )  # fmt: skip
    return values, y_scales


def swiglu_quantise_columns(
    gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor]:
    gate_up, scales, weight = gate_up.contiguous(), _dense(scales), _dense(weight)
    (m, stride), f = gate_up.shape, width // 2
    values, y_scales = new_tiles(gate_up, f, m)
    if values.numel():
        grid = (padded(m) // TILE * triton.cdiv(f, CHANNELS),)
        kernels.columns_kernel[grid](
            gate_up, scales, weight, values, y_scales, m, f, stride, padded(m), CHANNELS, f % TILE == 0, pow2,
            **COLUMNS_LAUNCH,
        )  # fmt: skip
    return values, y_scales


def swiglu_backward(
    dy: Tensor, gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    dy, gate_up, scales, weight = dy.contiguous(), gate_up.contiguous(), _dense(scales), _dense(weight)
    (m, stride), f = gate_up.shape, width // 2
    d_gate_up, parts = dy.new_empty(m, width), _parts(weight, dy, f)
    if d_gate_up.numel():
        grid = (triton.cdiv(m, ROWS) * triton.cdiv(f, TILE),)
        kernels.backward_kernel[grid](
            dy, gate_up, scales, weight, d_gate_up, parts, m, f, stride, ROWS, f % TILE == 0, **ROWS_LAUNCH
        )
    return d_gate_up, _summed(parts, weight, dy)


def swiglu_backward_quantise(
    dy: Tensor, gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, gate_up, scales, weight = dy.contiguous(), gate_up.contiguous(), _dense(scales), _dense(weight)
    (m, stride), f = gate_up.shape, width // 2
    if f % TILE:  # tiles across the middle of d_gate_up: two steps by way of FP32
        d_gate_up, d_weight = swiglu_backward(dy.float(), gate_up, scales, width, weight)
        rows, columns = quantise_both(d_gate_up, pow2=pow2, backend="triton")
        return rows.values, rows.scales, columns.values, columns.scales, d_weight
    rows, columns, parts = new_tiles(dy, m, width), new_tiles(dy, width, m), _parts(weight, dy, f)
    if rows[0].numel():
        grid = (padded(m) // TILE * (f // TILE) * (2 if SPLIT else 1),)
        kernels.backward_quantise_kernel[grid](
            dy,
            gate_up,
            scales,
            weight,
            *rows,
            *columns,
            parts,
            m,
            f,
            stride,
            padded(m),
            pow2,
            16 // gate_up.element_size(),
            SPLIT,
            **SQUARE_LAUNCH,
        )
    return *rows, *columns, _summed(parts, weight, dy)
