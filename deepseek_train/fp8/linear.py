"""Linear layers from FP8 operands: y = x W^T with all three products in FP8 (V3 report section 3.3.1).

The input is quantised outside autograd's functions, where recomputation can forget what was made of something
forgotten. Shapes: x [.., K], W [N, K], y [.., N]; see ``deepseek_kernels.formats``.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels.formats import Rows
from deepseek_train.fp8.room import Fp8
from deepseek_train.fp8.storage import Kept, Storage
from deepseek_train.phases.wgrad import Weight


@dataclass(frozen=True)
class _Setting:
    """All that both passes need besides tensors."""

    fp8: Fp8
    weights: tuple[Weight, ...]
    storage: Storage


class _Linears(Function):
    """Takes ``x`` and the weights for their place in the graph; ``rows`` is what is multiplied, ``kept`` what waits."""

    @staticmethod
    def forward(
        ctx: Any, setting: _Setting, rows: Rows, kept: Kept, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*kept)
        ctx.setting, ctx.shape, ctx.dtype = setting, x.shape, x.dtype
        products = (setting.fp8.forward(rows, weight, x.dtype) for weight in setting.weights)
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        setting, kept = ctx.setting, ctx.saved_tensors
        fp8, weights, width = setting.fp8, setting.weights, ctx.shape[-1]
        operands = [fp8.gradient_operands(dy.flatten(0, -2)) for dy in dys]
        dx = None
        if ctx.needs_input_grad[3]:
            for (rows, _), weight in zip(operands, weights, strict=True):
                part = fp8.backward(rows, weight, ctx.dtype)
                dx = part if dx is None else dx.add_(part)
        transposed = [dy_t for _, dy_t in operands]

        def weight_gradients() -> None:
            x_t = setting.storage.columns(kept, width)
            for weight, dy_t in zip(weights, transposed, strict=True):
                fp8.add_gradient(weight, dy_t, x_t)

        fp8.queue.add(weight_gradients)
        return None, None, None, None if dx is None else dx.view(ctx.shape), *(None for _ in weights)


def fp8_linears(
    x: Tensor, weights: tuple[Weight, ...], fp8: Fp8, storage: Storage | None = None
) -> tuple[Tensor, ...]:
    """x W^T for each of ``weights``: the input is quantised once, for all of them and both passes. ``storage``: how it
    waits for the weight gradients (None: the recipe's for linears). Results in the dtype of ``x``, BF16 or FP32."""
    storage = storage or fp8.recipe.inputs
    flat = x.detach().flatten(0, -2).contiguous()
    kept = fp8.recompute.derived(storage.keep, flat)
    rows = storage.rows(kept, flat)
    return _Linears.apply(_Setting(fp8, weights, storage), rows, kept, x, *weights)


def fp8_linear(x: Tensor, weight: Weight, fp8: Fp8, storage: Storage | None = None) -> Tensor:
    """x W^T."""
    (y,) = fp8_linears(x, (weight,), fp8, storage)
    return y
