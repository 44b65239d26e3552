"""Quantisation in plain torch. Legend: see ``formats``; G tiles, C 128 channels of a tile."""

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.formats import E4M3, LARGEST, LARGEST_E5M6, SMALLEST_AMAX, TILE


def scale_of(amax: Tensor, pow2: bool, largest: float = LARGEST) -> Tensor:
    """The scale of tiles with these largest magnitudes, FP32."""
    # By a tensor: by a number torch's CUDA division multiplies with the rounded inverse.
    scale = amax.clamp(min=SMALLEST_AMAX) / torch.full((), largest, device=amax.device)
    if not pow2:
        return scale
    up = scale.view(torch.int32) + 0x7FFFFF  # carries into the exponent unless the mantissa is 0
    return (up & -0x800000).view(torch.float32)


def amax_of(x: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """Largest magnitudes; NaN counts as 0."""
    return torch.nan_to_num(x.float().abs(), nan=0.0, posinf=torch.inf).amax(axes)


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(E4M3)


def from_e4m3(values: Tensor) -> Tensor:
    """FP32. On CPUs by a table: torch's conversion takes five times as long there."""
    if values.is_cuda:
        return values.float()
    table = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    return table.index_select(0, values.contiguous().view(torch.uint8).flatten().int()).view(values.shape)


def _tiles(x_MK: Tensor) -> Tensor:
    return functional.pad(x_MK, (0, -x_MK.shape[1] % TILE)).unflatten(1, (-1, TILE))


def quantise_rows(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    x_MGC = _tiles(x_MK)
    scale_MG = scale_of(amax_of(x_MGC, -1), pow2)
    return to_e4m3(x_MGC, scale_MG.unsqueeze(-1)).flatten(1), scale_MG.t().contiguous()


def quantise_columns(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantise_rows(x_MK.t().contiguous(), pow2)


def quantise_both(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *quantise_rows(x_MK, pow2), *quantise_columns(x_MK, pow2)


def requantise_columns(values: Tensor, scales: Tensor, width: int, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantise_columns(dequantise(values, scales, width, torch.float32), pow2)


def quantise_blocks(w: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    rows, width = w.shape[-2:]
    padded = functional.pad(w, (0, -width % TILE, 0, -rows % TILE))
    blocks = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))  # [.., N / 128, 128, K / 128, 128]
    scales = scale_of(amax_of(blocks, (-3, -1)), pow2)
    values = to_e4m3(blocks, scales.unsqueeze(-1).unsqueeze(-3))
    return values.flatten(-4, -3).flatten(-2), scales


def transpose_values(values: Tensor) -> Tensor:
    return values.view(torch.uint8).mT.contiguous().view(E4M3)


def dequantise(values: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    scale_MK = scales.t().repeat_interleave(TILE, 1)
    return (from_e4m3(values) * scale_MK)[:, :width].to(dtype).contiguous()


def pack_e5m6(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    x_MGC = _tiles(x_MK)
    scale_MG = scale_of(amax_of(x_MGC, -1), True, LARGEST_E5M6)
    scaled = (x_MGC.float() * (1.0 / scale_MG.unsqueeze(-1))).clamp(-LARGEST_E5M6, LARGEST_E5M6)
    bits = scaled.half().view(torch.int16).long() & 0xFFFF
    rounded = (bits + 7 + (bits >> 4 & 1)) >> 4
    codes = torch.where(scaled.isnan(), 0x7E0, rounded).flatten(1)  # rounding may carry a NaN's payload away
    a, b, c, d, e, f, g, h = codes.unflatten(1, (-1, 8)).unbind(-1)
    words = torch.stack(
        [a | b << 12 | c << 24, c >> 8 | d << 4 | e << 16 | f << 28, f >> 4 | g << 8 | h << 20], -1
    )
    return words.flatten(1).to(torch.int32), scale_MG.t().contiguous()


def unpack_e5m6(words: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    p, q, r = (words.long() & 0xFFFFFFFF).unflatten(1, (-1, 3)).unbind(-1)
    codes = torch.stack(
        [p, p >> 12, p >> 24 | q << 8, q >> 4, q >> 16, q >> 28 | r << 4, r >> 8, r >> 20], -1
    ).flatten(1)
    halves = ((codes & 0xFFF) << 4).to(torch.int16).view(torch.float16)
    return (halves.float() * scales.t().repeat_interleave(TILE, 1))[:, :width].to(dtype).contiguous()
