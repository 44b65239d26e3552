"""Quantisation as Triton kernels. Legend: see ``formats``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.formats import E4M3, TILE, padded
from deepseek_kernels.tile_math import inverse_of, scale_of

ROWS, ROWS_LAUNCH = 16, {"num_warps": 4, "num_stages": 1}


@triton.jit
def rows_kernel(x_ptr, value_ptr, scale_ptr, M, K, KP, POW2: tl.constexpr, R: tl.constexpr):
    """One tile of R rows x 128 channels."""
    m = tl.program_id(0) * R + tl.arange(0, R)
    g = tl.program_id(1)
    k = g * 128 + tl.arange(0, 128)
    at = m.to(tl.int64)[:, None]
    inside = m[:, None] < M
    x = tl.load(x_ptr + at * K + k[None, :], mask=inside & (k[None, :] < K), other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), axis=1), POW2)
    values = (x * inverse_of(scale)[:, None]).to(tl.float8e4nv)
    tl.store(value_ptr + at * KP + k[None, :], values, mask=inside)
    tl.store(scale_ptr + g * M + m, scale, mask=m < M)


def quantise_rows(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    x_MK = x_MK.contiguous()
    m, k = x_MK.shape
    kp = padded(k)
    values = x_MK.new_empty(m, kp, dtype=E4M3)
    scales = x_MK.new_empty(kp // TILE, m, dtype=torch.float32)
    if values.numel():
        grid = (triton.cdiv(m, ROWS), kp // TILE)
        rows_kernel[grid](x_MK, values, scales, m, k, kp, pow2, ROWS, **ROWS_LAUNCH)
    return values, scales
