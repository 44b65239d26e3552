"""Weight gradients in plain torch: operands as wide as the sum."""

from torch import Tensor


def weight_gradient(dy: Tensor, x: Tensor, into: Tensor) -> None:
    into.addmm_(dy.to(into.dtype).t(), x.to(into.dtype))
