"""Linear layers whose weight gradient is queued: y = x W^T, without bias (V3 has none).

Shapes: x [..., in], W [out, in]; grouped: rows sorted by expert, W [E, out, in].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels.choice import ON_CPU
from deepseek_kernels.wgrad import weight_gradient
from deepseek_train.phases.wgrad import Weight, WeightGradQueue


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, queue: WeightGradQueue, wgrad: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue, ctx.wgrad = weight, queue, wgrad
        return x @ weight.to(x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), weight, wgrad = ctx.saved_tensors, ctx.weight, ctx.wgrad

        def add() -> None:
            weight_gradient(dy.flatten(0, -2), x.flatten(0, -2), weight.main_grad, backend=wgrad)

        ctx.queue.add(add)
        return dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None, None, None, None


class _GroupedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, rows_E: tuple[int, ...], queue: WeightGradQueue, wgrad: str
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.rows_E, ctx.queue, ctx.wgrad = weight, rows_E, queue, wgrad
        y = x.new_empty(x.shape[0], weight.shape[1])
        for part, out, w in zip(x.split(rows_E), y.split(rows_E), weight, strict=True):
            torch.mm(part, w.t(), out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (x,), weight, rows_E, wgrad = ctx.saved_tensors, ctx.weight, ctx.rows_E, ctx.wgrad

        def weight_gradients() -> None:
            for grad, d, part in zip(weight.main_grad, dy.split(rows_E), x.split(rows_E), strict=True):
                if part.shape[0]:
                    weight_gradient(d, part, grad, backend=wgrad)

        ctx.queue.add(weight_gradients)
        dx = torch.empty_like(x)
        for part, out, w in zip(dy.split(rows_E), dx.split(rows_E), weight, strict=True):
            torch.mm(part, w, out=out)
        return dx, None, None, None, None


def linear(x: Tensor, weight: Weight, queue: WeightGradQueue, wgrad: str = ON_CPU.wgrad) -> Tensor:
    """x W^T, computed in the dtype of ``x``; the weight gradient is queued, for the backend ``wgrad``."""
    return _Linear.apply(x, weight, queue, wgrad)


def grouped_linear(
    x: Tensor, weight: Weight, rows_E: tuple[int, ...], queue: WeightGradQueue, wgrad: str = ON_CPU.wgrad
) -> Tensor:
    """For each expert e its ``rows_E[e]`` consecutive rows of ``x`` times W[e]^T. Experts may have no rows."""
    return _GroupedLinear.apply(x, weight, rows_E, queue, wgrad)
