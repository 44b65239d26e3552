"""Weight gradients of linears that stay out of FP8 (router, head; all of them in BF16 runs): into += dy^T x, summed
in the
accumulator's precision (V3 report section 3.3.1: gradients are accumulated in FP32).

Legend: M tokens, N outputs, K inputs.
"""

import torch
from torch import Tensor

from deepseek_kernels.registry import define
from deepseek_kernels.shapes import check_axes, check_dtype, check_shape


def _fake(dy: Tensor, x: Tensor, into: Tensor) -> None:
    return None


_weight_gradient = define(
    __name__,
    "weight_gradient(Tensor dy, Tensor x, Tensor(a!) into, *, str backend) -> ()",
    _fake,
    ("reference", "torch", "ext"),
)


def weight_gradient(dy_MN: Tensor, x_MK: Tensor, into_NK: Tensor, *, backend: str) -> None:
    """Adds dy^T x to ``into``, FP32 (FP64 where the model is). ``reference`` widens both operands first; ``torch``
    multiplies
    them as they are, with an FP32 result; ``ext`` is apex's one kernel."""
    check_axes("weight_gradient", "dy", dy_MN, "M, N")
    check_axes("weight_gradient", "x", x_MK, "M, K")
    (rows, outputs), inputs = dy_MN.shape, x_MK.shape[1]
    check_shape("weight_gradient", "x", x_MK, (rows, inputs), "dy", dy_MN.shape)
    check_shape("weight_gradient", "into", into_NK, (outputs, inputs), "dy^T x with x", x_MK.shape)
    check_dtype("weight_gradient", "into", into_NK.dtype, torch.float32, torch.float64)
    _weight_gradient(dy_MN, x_MK, into_NK, backend=backend)
