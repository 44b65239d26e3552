"""Bias-only load balancing (V3 report section 2.1.2): after each step, experts that got more than the mean of the
global batch are made less attractive by gamma, the others more. The bias only steers the selection."""

import torch
from torch import Tensor


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """b_e += speed * sign(mean load - load_e), in place; ``load_E`` counts tokens of the whole global batch."""
    load = load_E.to(bias_E.dtype)
    bias_E += speed * torch.sign(load.mean() - load)
