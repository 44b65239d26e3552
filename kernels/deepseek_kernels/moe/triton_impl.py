"""Rows to and from the experts as Triton kernels. Legend: see ``moe``."""

import triton
import triton.language as tl
from torch import Tensor, uint8

from deepseek_kernels.moe.triton_gate import gate, gate_backward
from deepseek_kernels.tile_math import scale_of

__all__ = ["expand", "expand_rows", "gate", "gate_backward", "reduce"]

# A program has so many channels. All rows of some channels come before the next channels: rows that are read several
# times are then still in L2.
CHANNELS, SUMMED_CHANNELS, LAUNCH = 512, 1024, {"num_warps": 4, "num_stages": 1}
BYTES = 8  # rows x bytes of an element: two accesses of 16 bytes a thread
SUMMED_BYTES = 4


@triton.jit
def expand_kernel(
    x_ptr, row_ptr, y_ptr, scale_ptr, y_scale_ptr, M, P, D,
    R: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """SCALED: with the scales of tiles of 128 channels, [D / 128, M] and [D / 128, P]."""
    p = tl.program_id(0) * R + tl.arange(0, R)
    d = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
    row = tl.load(row_ptr + p, mask=p < P, other=-1).to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * D + d, mask=(row >= 0)[:, None] & (d < D), other=0)
    if SCALED:
        g = (tl.program_id(1) * (C // 128) + tl.arange(0, C // 128)).to(tl.int64)[:, None]
        inside = (p < P)[None, :] & (g * 128 < D)
        scale = tl.load(scale_ptr + g * M + row[None, :], mask=(row >= 0)[None, :] & inside, other=0.0)
        nothing = scale_of(tl.zeros_like(scale), POW2)
        tl.store(y_scale_ptr + g * P + p[None, :], tl.where((row >= 0)[None, :], scale, nothing), mask=inside)
    tl.store(y_ptr + p.to(tl.int64)[:, None] * D + d, x, mask=(p < P)[:, None] & (d < D))


@triton.jit
def reduce_kernel(y_ptr, padded_ptr, x_ptr, M, D, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    d = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
    total = tl.zeros((R, C), tl.float32)
    for k in tl.static_range(K):
        p = tl.load(padded_ptr + r.to(tl.int64) * K + k, mask=r < M, other=-1).to(tl.int64)[:, None]
        total += tl.load(y_ptr + p * D + d, mask=(p >= 0) & (d < D), other=0.0).to(tl.float32)
    x = total.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + r.to(tl.int64)[:, None] * D + d, x, mask=(r < M)[:, None] & (d < D))


def _expand(
    x_RD: Tensor, padded_to_row_P: Tensor, scales: tuple[Tensor, Tensor] | None, pow2: bool
) -> Tensor:
    """``scales``: as they are, and where they go."""
    x_RD, (count, width) = x_RD.contiguous(), (len(padded_to_row_P), x_RD.shape[1])
    y_PD = x_RD.new_empty(count, width)
    if y_PD.numel():
        rows = BYTES // x_RD.element_size()
        grid = (triton.cdiv(count, rows), triton.cdiv(width, CHANNELS))
        expand_kernel[grid](
            x_RD, padded_to_row_P.contiguous(), y_PD, *(scales or (None, None)), len(x_RD), count, width,
            rows, CHANNELS, scales is not None, pow2, **LAUNCH,
        )  # fmt: skip
    return y_PD


def expand(x_RD: Tensor, padded_to_row_P: Tensor) -> Tensor:
    return _expand(x_RD, padded_to_row_P, None, False)


def expand_rows(
    values_RD: Tensor, scales_GR: Tensor, padded_to_row_P: Tensor, pow2: bool
) -> tuple[Tensor, Tensor]:
    scales_GR = scales_GR.contiguous()
    scales_GP = scales_GR.new_empty(len(scales_GR), len(padded_to_row_P))
    values = _expand(values_RD.view(uint8), padded_to_row_P, (scales_GR, scales_GP), pow2)
    return values.view(values_RD.dtype), scales_GP


def reduce(y_PD: Tensor, row_to_padded_RK: Tensor) -> Tensor:
    y_PD = y_PD.contiguous()
    (count, top_k), width = row_to_padded_RK.shape, y_PD.shape[1]
    x_RD = y_PD.new_empty(count, width)
    if x_RD.numel():
        rows = SUMMED_BYTES // y_PD.element_size()
        grid = (triton.cdiv(count, rows), triton.cdiv(width, SUMMED_CHANNELS))
        reduce_kernel[grid](
            y_PD, row_to_padded_RK.contiguous(), x_RD, count, width, top_k, rows, SUMMED_CHANNELS, **LAUNCH
        )
    return x_RD
