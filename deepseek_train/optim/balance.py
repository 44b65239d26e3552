"""Bias-only load balancing (V3 report section 2.1.2): after each step, experts that got more than the mean of the
global batch are made less attractive, the others more. The bias only steers the selection.

Two rules say by how much: ``sign`` moves every bias by gamma (V3), ``magnitude`` by gamma times how far the load is
off, in means (a variant in "Auxiliary-Loss-Free Load Balancing Strategy"; V3_SPEC A.6). Magnitude takes small steps
where the load is nearly even, where the sign rule goes on trembling by gamma.
"""

from typing import Literal, assert_never

import torch
from torch import Tensor


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, speed: float, rule: Literal["sign", "magnitude"]) -> None:
    """b_e += speed * sign(v_e), or speed * v_e, with v_e = (mean load - load_e) / mean load; in place.

    ``load_E`` counts the tokens of each expert in the whole global batch, one token at least.
    """
    load = load_E.to(bias_E.dtype)
    mean = load.mean()
    match rule:
        case "sign":
            bias_E += speed * torch.sign(mean - load)
        case "magnitude":
            bias_E += speed * (mean - load) / mean
        case _:
            assert_never(rule)
