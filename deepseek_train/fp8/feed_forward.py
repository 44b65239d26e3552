"""The dense feed-forward network and the shared expert in FP8, as one function of autograd.

Legend: see ``mlp``.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_train.fp8.mlp import Mlp
from deepseek_train.fp8.room import Fp8
from deepseek_train.fp8.storage import InFp8, Kept
from deepseek_train.phases.wgrad import Weight


class _FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any, mlp: Mlp, storage: InFp8, kept_x: Kept, x: Tensor, gate_up: Weight, down: Weight
    ) -> Tensor:
        y, kept = mlp.forward(InFp8.of(kept_x, x.shape[-1]), None)
        ctx.save_for_backward(*kept_x, *kept)
        ctx.mlp, ctx.storage, ctx.shape = mlp, storage, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, *kept = ctx.saved_tensors
        mlp, storage, width = ctx.mlp, ctx.storage, ctx.shape[-1]
        rows, transposed = mlp.fp8.gradient_operands(dy.flatten(0, -2))
        dx, _ = mlp.backward(
            tuple(kept),
            None,
            rows,
            lambda: transposed,
            lambda: storage.columns((values, scales), width),
        )
        return None, None, None, dx.view(ctx.shape), None, None


def fp8_feed_forward(x: Tensor, gate_up: Weight, down: Weight, fp8: Fp8, storage: InFp8) -> Tensor:
    """W_down swiglu(W_gate_up x) for x [.., D]. ``storage``: how ``x`` becomes FP8."""
    kept_x = fp8.recompute.derived(storage.keep, x.detach().flatten(0, -2).contiguous())
    return _FeedForward.apply(Mlp(fp8, gate_up, down, x.dtype), storage, kept_x, x, gate_up, down)
