"""Rotary position embedding with YaRN: adjacent pairs are turned as complex numbers (V2 report 2.1.3, V3 report 4.3).

Legend: B batch, T time, H heads, R rope dimension (even).
"""

import math

import torch
from torch import Tensor

from deepseek_train.config.schema import ModelConfig


def softmax_scale(m: ModelConfig) -> float:
    """(d_nope + d_rope)^-1/2, times YaRN's m^2, m = 0.1 mscale_all_dim ln(factor) + 1, in extended contexts."""
    scale = (m.qk_nope_head_dim + m.qk_rope_head_dim) ** -0.5
    return scale * _mscale(m.yarn.factor, m.yarn.mscale_all_dim) ** 2


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(m: ModelConfig) -> Tensor:
    """Angle per position of each pair, FP32 [R/2]. With YaRN: fast dimensions keep theirs, slow ones are divided by
    ``factor``, linear ramp between the two correction dimensions."""
    size = m.qk_rope_head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    plain = 1.0 / (m.rope_theta**exponents)
    yarn = m.yarn
    if yarn.factor <= 1.0:
        return plain

    def dimension_of(rotations: float) -> float:
        turns = yarn.original_length / (rotations * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(m.rope_theta))

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0.0, 1.0)
    return plain * (1.0 - slowed) + plain / yarn.factor * slowed


def rotations(m: ModelConfig, length: int, device: torch.device) -> Tensor:
    """Unit complex numbers [T, R/2] that turn positions 0..length-1, scaled by YaRN's mscale ratio."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(m))
    ratio = _mscale(m.yarn.factor, m.yarn.mscale) / _mscale(m.yarn.factor, m.yarn.mscale_all_dim)
    return torch.polar(torch.full_like(angles, ratio), angles).to(device)


def rotate(x_BTHR: Tensor, turns_TR: Tensor) -> Tensor:
    """Turns adjacent pairs of the last axis; computed in FP32 (FP64 for FP64 inputs), returned in the input's dtype."""
    wide = x_BTHR.to(torch.promote_types(x_BTHR.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_TR[:, None]).flatten(-2).to(x_BTHR.dtype)
