"""Rotary position embedding with YaRN: adjacent pairs are turned as complex numbers (V2 report 2.1.3, V3 report 4.3).

Legend: B batch, T time, H heads, R rope dimension (even), O channels of all heads.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels.rope import rotate_
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
    """Cosine and sine of each pair at positions 0..length-1, scaled by YaRN's mscale ratio: FP32 [T, R/2, 2]."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(m))
    ratio = _mscale(m.yarn.factor, m.yarn.mscale) / _mscale(m.yarn.factor, m.yarn.mscale_all_dim)
    return torch.view_as_real(torch.polar(torch.full_like(angles, ratio), angles)).to(device)


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x_BTO: Tensor, turns_TR2: Tensor, heads: int, backend: str) -> Tensor:
        ctx.save_for_backward(turns_TR2)
        ctx.heads, ctx.backend = heads, backend
        ctx.mark_dirty(x_BTO)
        _turn_ends(x_BTO, turns_TR2, heads, backend, inverse=False)
        return x_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTO: Tensor) -> tuple[Tensor, None, None, None]:
        (turns_TR2,), dx_BTO = ctx.saved_tensors, dy_BTO.contiguous()
        _turn_ends(dx_BTO, turns_TR2, ctx.heads, ctx.backend, inverse=True)
        return dx_BTO, None, None, None


def _turn_ends(x_BTO: Tensor, turns_TR2: Tensor, heads: int, backend: str, *, inverse: bool) -> None:
    ends_BTHR = x_BTO.unflatten(-1, (heads, -1))[..., -2 * turns_TR2.shape[1] :]
    rotate_(ends_BTHR, turns_TR2, inverse=inverse, backend=backend)


def turned(x_BTO: Tensor, turns_TR2: Tensor, heads: int, backend: str) -> Tensor:
    """Turns the last R channels of each head in [B, T, heads * channels], in place, and in the backward pass its
    gradient, in place as well: ``x`` must be something that nothing else has saved, and its result used once (then
    nobody else holds the gradient)."""
    return _Turn.apply(x_BTO, turns_TR2, heads, backend)
