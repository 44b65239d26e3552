"""Block-scaled products in plain torch: tile by tile in FP32, or as Hopper's tensor cores add up.

``sms`` means nothing here. Legend: see ``formats``; C the 128 elements of a tile, S the 32 of one tensor-core
instruction; R rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek_kernels.formats import TILE
from deepseek_kernels.quant.reference import from_e4m3

_STEP = 32  # elements along K of one FP8 instruction
_KEPT_BITS = 13  # fraction bits that survive in the tensor cores' accumulator (V3_SPEC D.1)
_CELLS = 1 << 17  # of the result worked on at a time: with the parts added to them they stay in a CPU's cache


def product(a_MK: Tensor, a_scales_GM: Tensor, b_NK: Tensor, b_scales_GN: Tensor, accumulate: str) -> Tensor:
    """FP32 [M, N] of two matrices whose scales are given for each row and tile."""
    total_MN = torch.zeros(len(a_MK), len(b_NK), device=a_MK.device)
    if not total_MN.numel():
        return total_MN
    add = {"promoted": _add_promoted, "hopper": _add_hopper, "unpromoted": _add_unpromoted}[accumulate]
    b_KN = from_e4m3(b_NK).t().contiguous()
    rows = max(1, _CELLS // len(b_NK))
    for a, scales, total in zip(
        a_MK.split(rows), a_scales_GM.split(rows, 1), total_MN.split(rows), strict=True
    ):
        a_RK = from_e4m3(a)
        for g in range(a_MK.shape[1] // TILE):
            at = slice(g * TILE, (g + 1) * TILE)
            add(total, a_RK[:, at], b_KN[at], scales[g, :, None] * b_scales_GN[g])
    return total_MN


def _add_promoted(total: Tensor, a_RC: Tensor, b_CN: Tensor, scale: Tensor) -> None:
    total.add_((a_RC @ b_CN).mul_(scale))


def _add_hopper(total: Tensor, a_RC: Tensor, b_CN: Tensor, scale: Tensor) -> None:
    """A tile is added up in the tensor cores' accumulator, and to the others in FP32."""
    first, *others = _parts(a_RC, b_CN)
    inside = _truncate(first)
    for part in others:
        _truncate(inside.add_(_truncate(part)))
    total.add_(inside.mul_(scale))


def _add_unpromoted(total: Tensor, a_RC: Tensor, b_CN: Tensor, scale: Tensor) -> None:
    """All is added up in the tensor cores' accumulator."""
    for part in _parts(a_RC, b_CN):
        _truncate(total.add_(_truncate(part.mul_(scale))))


def _parts(a_RC: Tensor, b_CN: Tensor) -> Iterator[Tensor]:
    """What each instruction multiplies, exact but for FP32."""
    for a_RS, b_SN in zip(a_RC.split(_STEP, 1), b_CN.split(_STEP), strict=True):
        yield a_RS @ b_SN


def _truncate(x: Tensor) -> Tensor:
    """FP32 with 13 fraction bits, cut off in place."""
    x.view(torch.int32).bitwise_and_(-(1 << (23 - _KEPT_BITS)))
    return x


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
