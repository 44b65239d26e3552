"""Weight gradients by cuBLAS: BF16 operands, FP32 result, added. On CPUs, where torch has no such product, and for
operands as wide as the sum, it is the reference's."""

import torch
from torch import Tensor

from deepseek_kernels.wgrad import reference


def weight_gradient(dy: Tensor, x: Tensor, into: Tensor) -> None:
    if dy.is_cuda and into.dtype is torch.float32 and dy.dtype is torch.bfloat16:
        into += torch.mm(dy.t(), x, out_dtype=torch.float32)
    else:
        reference.weight_gradient(dy, x, into)
