"""RMSNorm in FP32: y = g * cast(x / sqrt(mean(x^2) + eps))."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_train.model.context import ModelContext
from deepseek_train.phases.wgrad import Weight, WeightGradQueue


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision reductions run in: FP32, or FP64 where the model itself is FP64."""
    return torch.promote_types(dtype, torch.float32)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Weight, eps: float, queue: WeightGradQueue) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
        scale = (length.square() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale)
        ctx.gain, ctx.queue = gain, queue
        return (x * scale).to(x.dtype).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x, scale), gain = ctx.saved_tensors, ctx.gain
        normed = x * scale
        d_normed = (dy * gain).to(scale.dtype)
        along = (d_normed * normed).mean(-1, keepdim=True)
        dx = d_normed.addcmul_(normed, along, value=-1.0).mul_(scale)
        ctx.queue.add(lambda: _gain_gradient(gain, dy, normed))
        return dx.to(x.dtype), None, None, None


def _gain_gradient(gain: Weight, dy: Tensor, normed: Tensor) -> None:
    rows = (dy * normed.to(dy.dtype)).flatten(0, -2)
    gain.main_grad += rows.sum(0, dtype=gain.main_grad.dtype)


def rms_norm(x: Tensor, gain: Weight, eps: float, queue: WeightGradQueue) -> Tensor:
    """Normalises the last axis of ``x``; result in the dtype of ``x``. V3 report section 2.1; the weight multiplies
    after the cast, as in the published inference code."""
    return _RmsNorm.apply(x, gain, eps, queue)


def forgettable_norm(x: Tensor, gain: Weight, context: ModelContext) -> Tensor:
    """``rms_norm`` in a model: what it gives is a region of recomputation."""
    eps, queue = context.model.norm_eps, context.queue
    return context.recompute.region("norm", lambda x: rms_norm(x, gain, eps, queue), x)
