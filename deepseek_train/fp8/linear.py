"""Linear layers from FP8 operands: y = x W^T with all three products in FP8 (V3 report section 3.3.1).

The input is quantised outside autograd's functions, where recomputation can forget what was made of something
forgotten. Shapes: x [.., K], W [N, K], y [.., N]; see ``deepseek_kernels.formats``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_train.fp8.room import Fp8
from deepseek_train.fp8.storage import InFp8, Kept
from deepseek_train.phases.wgrad import Weight


@dataclass(frozen=True)
class _Setting:
    """All that both passes need besides tensors."""

    fp8: Fp8
    weights: tuple[Weight, ...]


class _Linears(Function):
    """Takes ``x`` and the weights for their place in the graph; ``kept`` is what is multiplied, and waits."""

    @staticmethod
    def forward(ctx: Any, setting: _Setting, kept: Kept, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*kept)
        rows = InFp8.of(kept, x.shape[-1])
        ctx.setting, ctx.shape, ctx.dtype = setting, x.shape, x.dtype
        products = (setting.fp8.forward(rows, weight, x.dtype) for weight in setting.weights)
        return tuple(_alone(y, (*x.shape[:-1], y.shape[1])) for y in products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        setting, kept = ctx.setting, ctx.saved_tensors
        fp8, weights, width = setting.fp8, setting.weights, ctx.shape[-1]
        operands = [fp8.gradient_operands(dy.flatten(0, -2)) for dy in dys]
        dx = None
        if ctx.needs_input_grad[2]:
            for (rows, _), weight in zip(operands, weights, strict=True):
                part = fp8.backward(rows, weight, ctx.dtype)
                dx = part if dx is None else dx.add_(part)
        transposed = [dy_t for _, dy_t in operands]

        def weight_gradients() -> None:
            x_t = fp8.recipe.inputs.columns(kept, width)
            for weight, dy_t in zip(weights, transposed, strict=True):
                fp8.add_gradient(weight, dy_t, x_t)

        fp8.queue.add(weight_gradients)
        return None, None, None if dx is None else dx.view(ctx.shape), *(None for _ in weights)


def _alone(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view that autograd takes for a tensor of its own: of several results, no view may be written to (rope does)."""
    return torch.ops.aten._unsafe_view(y.contiguous(), shape)


def fp8_linears(x: Tensor, weights: tuple[Weight, ...], fp8: Fp8) -> tuple[Tensor, ...]:
    """x W^T for each of ``weights``: the input is quantised once, for all of them and both passes, and waits in FP8
    for the weight gradients. Results in the dtype of ``x``, BF16 or FP32."""
    kept = fp8.recompute.derived(fp8.recipe.inputs.keep, x.detach().flatten(0, -2).contiguous())
    return _Linears.apply(_Setting(fp8, weights), kept, x, *weights)


def fp8_linear(x: Tensor, weight: Weight, fp8: Fp8) -> Tensor:
    """x W^T."""
    (y,) = fp8_linears(x, (weight,), fp8)
    return y
