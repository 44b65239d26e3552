"""Block-scaled products in plain torch: tile by tile in FP32, or as Hopper's tensor cores add up.

``sms`` means nothing here. Legend: see ``formats``; C the 128 elements of a tile, S the 32 of one tensor-core
instruction.
"""

import torch
from torch import Tensor

from deepseek_kernels.formats import TILE

_STEP = 32  # elements along K of one FP8 instruction
_KEPT_BITS = 13  # fraction bits that survive in the tensor cores' accumulator (V3_SPEC D.1)


def _truncated(x: Tensor) -> Tensor:
    """FP32 with 13 fraction bits, cut off."""
    return (x.view(torch.int32) & -(1 << (23 - _KEPT_BITS))).view(torch.float32)


def product(a_MK: Tensor, a_scales_GM: Tensor, b_NK: Tensor, b_scales_GN: Tensor, accumulate: str) -> Tensor:
    """FP32 [M, N] of two matrices whose scales are given for each row and tile."""
    total = torch.zeros(len(a_MK), len(b_NK), device=a_MK.device)
    for g in range(a_MK.shape[1] // TILE):
        at = slice(g * TILE, (g + 1) * TILE)
        a_MC, b_NC = a_MK[:, at].float(), b_NK[:, at].float()
        scale_MN = a_scales_GM[g, :, None] * b_scales_GN[g]
        if accumulate == "promoted":
            total += (a_MC @ b_NC.t()) * scale_MN
            continue
        inside = torch.zeros_like(total) if accumulate == "hopper" else total
        for a_MS, b_NS in zip(a_MC.split(_STEP, 1), b_NC.split(_STEP, 1), strict=True):
            part = a_MS @ b_NS.t()
            inside = _truncated(inside + _truncated(part if accumulate == "hopper" else part * scale_MN))
        total = total + inside * scale_MN if accumulate == "hopper" else inside
    return total


def _by_row(scales_BG: Tensor, rows: int) -> Tensor:
    """Scales of blocks as scales of rows: [G, rows]."""
    return scales_BG.repeat_interleave(TILE, 0)[:rows].t()


def gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    rows: int,
    dtype: torch.dtype,
    accumulate: str,
    sms: int = 0,
) -> Tensor:
    return product(a, a_scales, b[:rows], _by_row(b_scales, rows), accumulate).to(dtype)


def gemm_add(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, into: Tensor, accumulate: str, sms: int = 0
) -> None:
    into += product(a, a_scales, b, b_scales, accumulate)


def grouped_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor,
    tile_expert: Tensor,
    rows: int,
    dtype: torch.dtype,
    accumulate: str,
    sms: int = 0,
) -> Tensor:
    y = a.new_empty(len(a), rows, dtype=dtype)
    bounds = starts.tolist()
    for e, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        at = slice(first, last)
        y[at] = gemm(a[at], a_scales[:, at], b[e], b_scales[e], rows, dtype, accumulate)
    return y


def grouped_gemm_add(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor,
    into: Tensor,
    accumulate: str,
    sms: int = 0,
) -> None:
    bounds = starts.tolist()
    for e, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        at, tiles = slice(first, last), slice(first // TILE, last // TILE)
        gemm_add(a[:, at], a_scales[tiles], b[:, at], b_scales[tiles], into[e], accumulate)
