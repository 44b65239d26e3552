"""AdamW in plain torch, one rounding an operation: none that torch might fuse (``lerp``, ``addcmul``) and none
that it does otherwise on a GPU (division by a number)."""

import torch
from torch import Tensor

from deepseek_kernels.optim.factors import Factors


@torch.no_grad()
def adamw(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, low: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    by = Factors.of(lr, beta1, beta2, eps, weight_decay, step)
    m = exp_avg.float()
    m = m + (grad - m) * by.grad1
    v = exp_avg_sq.float() * by.beta2 + grad * by.grad2 * grad
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    root = (
        v.double().sqrt().float()
    )  # what torch takes for a square root in FP32 is not always the nearest number
    weight.copy_(weight * by.kept - m / (root * by.correction + by.eps) * by.rate)
    if low is not None:
        low.copy_(weight)
