"""Token embedding whose weight gradient is queued."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from deepseek_train.phases.wgrad import Weight, WeightGradQueue


class _Embed(Function):
    @staticmethod
    def forward(ctx: Any, tokens_BT: Tensor, weight: Weight, queue: WeightGradQueue) -> Tensor:
        ctx.save_for_backward(tokens_BT)
        ctx.weight, ctx.queue = weight, queue
        return functional.embedding(tokens_BT, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        (tokens_BT,), weight = ctx.saved_tensors, ctx.weight

        def weight_gradient() -> None:
            rows = dy.flatten(0, -2).to(weight.main_grad.dtype)
            weight.main_grad.index_add_(0, tokens_BT.flatten(), rows)

        ctx.queue.add(weight_gradient)
        return None, None, None


def embed(tokens_BT: Tensor, weight: Weight, queue: WeightGradQueue) -> Tensor:
    """Rows of ``weight`` [V, D] for int64 tokens: [B, T, D]."""
    return _Embed.apply(tokens_BT, weight, queue)
