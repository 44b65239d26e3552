"""Rotary position embedding in plain torch. Legend: see ``rope``."""

import torch
from torch import Tensor


def rotate_(x_BTHR: Tensor, turns_TR2: Tensor, inverse: bool) -> None:
    wide = x_BTHR.to(torch.promote_types(x_BTHR.dtype, torch.float32))
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns_TR2.unsqueeze(1).unbind(-1)
    if inverse:
        sin = -sin
    x_BTHR.copy_(torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2))
