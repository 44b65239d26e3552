"""Rotary position embedding by torch's complex numbers: fewer passes; some products are only rounded in their sum.
Legend: see ``rope``."""

import torch
from torch import Tensor


def rotate_(x_BTHR: Tensor, turns_TR2: Tensor, inverse: bool) -> None:
    wide = x_BTHR.to(torch.promote_types(x_BTHR.dtype, torch.float32)).contiguous()
    pairs, turns = torch.view_as_complex(wide.unflatten(-1, (-1, 2))), torch.view_as_complex(turns_TR2)
    turned = pairs * (turns.conj() if inverse else turns).unsqueeze(1)
    x_BTHR.copy_(torch.view_as_real(turned).flatten(-2))
