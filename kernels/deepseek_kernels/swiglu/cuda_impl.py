"""SwiGLU whose results are turned, by ``csrc/quantise_tiles.cu`` for Hopper; the rest are Triton's kernels (see
``quant.cuda_impl``), with which these agree to the bit. Legend: see the package."""

import torch
from torch import Tensor

from deepseek_kernels.formats import TILE, new_tiles
from deepseek_kernels.quant.cuda_impl import (
    GRADIENTS,
    GRADIENTS_KEPT,
    SWIGLU,
    SWIGLU_KEPT,
    run_tiles,
    whole,
)
from deepseek_kernels.swiglu import triton_impl
from deepseek_kernels.swiglu.triton_impl import swiglu, swiglu_backward, swiglu_quantise  # noqa: F401


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def swiglu_quantise_columns(
    gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor]:
    f = width // 2
    if not whole(gate_up, f):
        return triton_impl.swiglu_quantise_columns(gate_up, scales, width, weight, pow2)
    turned, x_scales, factors = new_tiles(gate_up, f, len(gate_up)), _wide(scales), _wide(weight)
    source = SWIGLU if scales is None else SWIGLU_KEPT
    run_tiles(source, gate_up, f, pow2, into_t=turned, x_scales=x_scales, weight=factors)
    return turned


def swiglu_backward_quantise(
    dy: Tensor, gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, f = dy.shape
    dy = dy.contiguous()
    if dy.dtype is not torch.bfloat16 or not (whole(gate_up, f) and whole(dy, f)):
        return triton_impl.swiglu_backward_quantise(dy, gate_up, scales, width, weight, pow2)
    x_scales, factors = _wide(scales), _wide(weight)
    rows, turned = new_tiles(dy, m, width), new_tiles(dy, width, m)
    parts = None if weight is None else dy.new_empty(f // TILE, m, dtype=torch.float32)
    run_tiles(
        GRADIENTS if scales is None else GRADIENTS_KEPT,
        gate_up,
        f,
        pow2,
        into_t=turned,
        into=rows,
        x_scales=x_scales,
        dy=dy,
        weight=factors,
        parts=parts,
    )
    d_weight = dy.new_empty(0) if parts is None or weight is None else parts.sum(0).to(weight.dtype)
    return *rows, *turned, d_weight
