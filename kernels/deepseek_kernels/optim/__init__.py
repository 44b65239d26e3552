"""AdamW over flat FP32 master weights, with moments in FP32 or BF16 (V3 report section 3.3.3 keeps them in BF16).

    m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2
    w <- (1 - lr weight_decay) w - lr / (1 - beta1^step) m / (sqrt(v) (1 - beta2^step)^(-1/2) + eps)

FP32 inside, every operation rounded once, in this order: ``reference`` and ``triton`` give the same bits. ``torch``
adds in another order; on CPUs it is several times faster.
"""

import torch
from torch import Tensor

from deepseek_kernels.registry import define
from deepseek_kernels.shapes import check_dtype


def _fake(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    return None


_adamw = define(
    __name__,
    "adamw(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? low, float lr,"
    " float beta1, float beta2, float eps, float weight_decay, int step, *, str backend) -> ()",
    _fake,
    ("reference", "triton", "torch"),
)


def adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    *,
    low: Tensor | None = None,
    backend: str,
) -> None:
    """One update in place, in one pass. All tensors are contiguous and of one size N; ``weight`` and ``grad`` FP32.

    The moments are widened, updated, and rounded to nearest even where they are BF16; the update uses them unrounded.
    ``low``, BF16 [N], becomes the rounded copy of the updated weights that the model computes with. ``step`` counts
    from 1.
    """
    for name, one in (
        ("weight", weight),
        ("grad", grad),
        ("exp_avg", exp_avg),
        ("exp_avg_sq", exp_avg_sq),
        ("low", low),
    ):
        if one is not None and one.numel() != weight.numel():
            raise ValueError(
                f"adamw: {name} is {list(one.shape)}, must be of one size with weight {list(weight.shape)}"
            )
        if one is not None and not one.is_contiguous():
            raise ValueError(f"adamw: {name} must be contiguous, strides are {one.stride()}")
    check_dtype("adamw", "weight", weight.dtype, torch.float32)
    check_dtype("adamw", "grad", grad.dtype, torch.float32)
    _adamw(weight, grad, exp_avg, exp_avg_sq, low, lr, beta1, beta2, eps, weight_decay, step, backend=backend)
