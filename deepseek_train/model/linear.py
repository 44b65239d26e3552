"""Linear layers whose weight gradient is queued: y = x W^T, without bias (V3 has none).

Shapes: x [..., in], W [out, in]; grouped: rows sorted by expert, W [E, out, in].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_train.phases.wgrad import Weight, WeightGradQueue

# NVIDIA's apex, built from source with its CUDA extensions (PyPI's `apex` is another project): main_grad += dy^T x in
# one kernel, BF16 operands, FP32 accumulator.
try:
    from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32
except ImportError:
    wgrad_gemm_accum_fp32 = None
fused_accumulate: Callable[[Tensor, Tensor, Tensor], None] | None = wgrad_gemm_accum_fp32


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, queue: WeightGradQueue) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue = weight, queue
        return x @ weight.to(x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        ctx.queue.add(lambda: accumulate(weight.main_grad, dy.flatten(0, -2), x.flatten(0, -2)))
        return dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None, None, None


class _GroupedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, rows_E: tuple[int, ...], queue: WeightGradQueue
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.rows_E, ctx.queue = weight, rows_E, queue
        y = x.new_empty(x.shape[0], weight.shape[1])
        for part, out, w in zip(x.split(rows_E), y.split(rows_E), weight, strict=True):
            torch.mm(part, w.t(), out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), weight, rows_E = ctx.saved_tensors, ctx.weight, ctx.rows_E

        def weight_gradients() -> None:
            for grad, d, part in zip(weight.main_grad, dy.split(rows_E), x.split(rows_E), strict=True):
                if part.shape[0]:
                    accumulate(grad, d, part)

        ctx.queue.add(weight_gradients)
        dx = torch.empty_like(x)
        for part, out, w in zip(dy.split(rows_E), dx.split(rows_E), weight, strict=True):
            torch.mm(part, w, out=out)
        return dx, None, None, None


def accumulate(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """main_grad += dy^T x in the accumulator's precision; dy [rows, out], x [rows, in]."""
    on_tensor_cores = main_grad.is_cuda and x.dtype is torch.bfloat16 and main_grad.dtype is torch.float32
    if on_tensor_cores and fused_accumulate is not None:
        fused_accumulate(x.contiguous(), dy.contiguous(), main_grad)
    elif on_tensor_cores:  # FP32 operands would take the slow units
        main_grad.add_(torch.mm(dy.t(), x, out_dtype=main_grad.dtype))
    else:
        main_grad.addmm_(dy.to(main_grad.dtype).t(), x.to(main_grad.dtype))


def linear(x: Tensor, weight: Weight, queue: WeightGradQueue) -> Tensor:
    """x W^T, computed in the dtype of ``x``; the weight gradient is queued."""
    return _Linear.apply(x, weight, queue)


def grouped_linear(x: Tensor, weight: Weight, rows_E: tuple[int, ...], queue: WeightGradQueue) -> Tensor:
    """For each expert e its ``rows_E[e]`` consecutive rows of ``x`` times W[e]^T. Experts may have no rows."""
    return _GroupedLinear.apply(x, weight, rows_E, queue)
