"""SwiGLU and the dense feed-forward network built on it.

Legend: N rows, F feed-forward size, D hidden.
"""

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels import swiglu as kernels
from deepseek_train.fp8.feed_forward import fp8_feed_forward
from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import linear


class _SwiGlu(Function):
    """Saves its input only; the backward pass computes the activation again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_N: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(gate_up, weight_N)
        ctx.backend = backend
        y_NF = kernels.swiglu(gate_up.flatten(0, -2), weight_N, backend=backend)
        return y_NF.view(*gate_up.shape[:-1], y_NF.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate_up, weight_N = ctx.saved_tensors
        d_gate_up, d_weight_N = kernels.swiglu_backward(
            dy.flatten(0, -2), gate_up.flatten(0, -2), weight_N, backend=ctx.backend
        )
        return d_gate_up.view(gate_up.shape), d_weight_N, None


def swiglu(gate_up: Tensor, weight_N: Tensor | None, backend: str) -> Tensor:
    """silu(gate) * up for [..., 2F] with the gate half first: [..., F]; each row times its routing weight if given
    (V3_SPEC D.3: DeepSeek applies it here, so that combine is an unweighted sum)."""
    return _SwiGlu.apply(gate_up, weight_N, backend)


def forgettable_swiglu(context: ModelContext, gate_up: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """``swiglu`` in a model: what it gives is a region of recomputation."""
    inputs = (gate_up,) if weight_N is None else (gate_up, weight_N)

    def run(gate_up: Tensor, weight_N: Tensor | None = None) -> Tensor:
        return swiglu(gate_up, weight_N, context.kernels.swiglu)

    return context.recompute.region("swiglu", run, *inputs)


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
        wgrad = self.context.kernels.wgrad
        y = forgettable_swiglu(self.context, linear(x, self.gate_up, self.queue, wgrad))
        return linear(y, self.down, self.queue, wgrad)
