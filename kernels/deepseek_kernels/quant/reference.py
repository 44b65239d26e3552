"""Quantisation in plain torch. Legend: see ``formats``; G tiles, C 128 channels of a tile."""

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.formats import E4M3, LARGEST, SMALLEST_AMAX, TILE


def scale_of(amax: Tensor, pow2: bool) -> Tensor:
    """The scale of tiles with these largest magnitudes, FP32."""
    scale = amax.clamp(min=SMALLEST_AMAX) / LARGEST
    if not pow2:
        return scale
    up = scale.view(torch.int32) + 0x7FFFFF  # carries into the exponent unless the mantissa is 0
    return (up & -0x800000).view(torch.float32)


def amax_of(x: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """Largest magnitudes; NaN counts as 0."""
    return torch.nan_to_num(x.float().abs(), nan=0.0, posinf=torch.inf).amax(axes)


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(E4M3)


def quantise_rows(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    x_MGC = functional.pad(x_MK, (0, -x_MK.shape[1] % TILE)).unflatten(1, (-1, TILE))
    scale_MG = scale_of(amax_of(x_MGC, -1), pow2)
    return to_e4m3(x_MGC, scale_MG.unsqueeze(-1)).flatten(1), scale_MG.t().contiguous()
