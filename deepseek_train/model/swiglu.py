"""SwiGLU and the dense feed-forward network built on it.

Legend: N rows, F feed-forward size, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from deepseek_train.fp8.feed_forward import fp8_feed_forward
from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import linear


class _SwiGlu(Function):
    """Saves its input only; the backward pass computes the activation again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weight_N)
        gate, up = gate_up.chunk(2, -1)
        y = functional.silu(gate).mul_(up)
        return y if weight_N is None else y.mul_(weight_N.unsqueeze(-1).to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weight_N = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.mul(dy, functional.silu(gate), out=d_up)
        d_silu, d_weight = dy * up, None
        if weight_N is not None:
            d_weight = (d_up * up).sum(-1, dtype=weight_N.dtype)
            scale = weight_N.unsqueeze(-1).to(dy.dtype)
            d_up.mul_(scale)
            d_silu.mul_(scale)
        torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_gate)
        return d_gate_up, d_weight


def swiglu(gate_up: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """silu(gate) * up for [..., 2F] with the gate half first: [..., F]; each row times its routing weight if given
    (V3_SPEC D.3: DeepSeek applies it here, so that combine is an unweighted sum)."""
    return _SwiGlu.apply(gate_up, weight_N)


def forgettable_swiglu(context: ModelContext, gate_up: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """``swiglu`` in a model: what it gives is a region of recomputation."""
    return context.recompute.region(
        "swiglu", swiglu, *((gate_up,) if weight_N is None else (gate_up, weight_N))
    )


class FeedForward(nn.Module):
    """W_down swiglu(W_gate_up x): the FFN of dense layers and the shared ``expert``."""

    def __init__(self, context: ModelContext, inner: int, *, expert: bool = False) -> None:
        super().__init__()
        self.expert = expert
        hidden = context.model.hidden_size
        self.context, self.queue = context, context.queue
        self.gate_up = context.weight(2 * inner, hidden)
        self.down = context.weight(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        fp8 = self.context.fp8
        if fp8 is not None:
            storage = fp8.recipe.expert_inputs if self.expert else fp8.recipe.inputs
            return fp8_feed_forward(x, self.gate_up, self.down, fp8, storage)
        y = forgettable_swiglu(self.context, linear(x, self.gate_up, self.queue))
        return linear(y, self.down, self.queue)
