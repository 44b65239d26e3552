"""RMSNorm whose weight gradient is queued. The formula: ``deepseek_kernels.norm``."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels import norm
from deepseek_train.model.context import ModelContext
from deepseek_train.phases.wgrad import Weight, WeightGradQueue


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision reductions run in: FP32, or FP64 where the model itself is FP64."""
    return torch.promote_types(dtype, torch.float32)


class _RmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Weight, eps: float, queue: WeightGradQueue, backend: str
    ) -> Tensor:
        y_MD, scale_M = norm.rms_norm(x.flatten(0, -2), gain, eps, backend=backend)
        ctx.save_for_backward(x, scale_M)
        ctx.gain, ctx.queue, ctx.backend = gain, queue, backend
        return y_MD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x, scale_M), gain, backend = ctx.saved_tensors, ctx.gain, ctx.backend
        dy_MD, x_MD = dy.flatten(0, -2), x.flatten(0, -2)
        dx_MD = norm.rms_norm_backward(dy_MD, x_MD, scale_M, gain, backend=backend)
        ctx.queue.add(
            lambda: norm.rms_norm_gain_gradient(dy_MD, x_MD, scale_M, gain.main_grad, backend=backend)
        )
        return dx_MD.view(x.shape), None, None, None, None


def rms_norm(x: Tensor, gain: Weight, eps: float, queue: WeightGradQueue, backend: str) -> Tensor:
    """Normalises the last axis of ``x``; result in the dtype of ``x``."""
    return _RmsNorm.apply(x, gain, eps, queue, backend)


def forgettable_norm(x: Tensor, gain: Weight, context: ModelContext) -> Tensor:
    """``rms_norm`` in a model: what it gives is a region of recomputation."""
    eps, queue, backend = context.model.norm_eps, context.queue, context.kernels.norm
    return context.recompute.region("norm", lambda x: rms_norm(x, gain, eps, queue, backend), x)
