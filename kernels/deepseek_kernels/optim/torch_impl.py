"""AdamW as torch has it: its fused one where moments are FP32. It has none whose moments are narrower than the weights;
for those, the same with operations that torch fuses."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw


@torch.no_grad()
def adamw(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, low: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    if exp_avg.dtype is weight.dtype:
        before = torch.tensor(step - 1.0, device=weight.device)
        torch_adamw(
            [weight], [grad], [exp_avg], [exp_avg_sq], [], [before], fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps,
        )  # fmt: skip
    else:
        m = exp_avg.to(weight.dtype).lerp_(grad, 1.0 - beta1)
        v = exp_avg_sq.to(weight.dtype).mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        denominator = v.sqrt_().div_((1.0 - beta2**step) ** 0.5).add_(eps)
        weight.mul_(1.0 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1.0 - beta1**step))
    if low is not None:
        low.copy_(weight)
