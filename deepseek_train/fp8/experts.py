"""The routed experts in FP8, as one function of autograd: expand, two grouped products around SwiGLU, reduce.

Received rows are quantised once, before they are copied for each of their experts; so are gradients of results. What
waits is the received rows in FP8, not the copies. Legend: R received rows, K experts per token, P rows sorted by expert
and padded, D hidden.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels.formats import Rows
from deepseek_train.fp8.mlp import Mlp
from deepseek_train.fp8.room import Fp8
from deepseek_train.fp8.sorting import Sorting
from deepseek_train.fp8.storage import InFp8, Kept
from deepseek_train.phases.wgrad import Weight


class _Experts(Function):
    @staticmethod
    def forward(
        ctx: Any, mlp: Mlp, sorting: Sorting, kept_x: Kept, x_RD: Tensor, weights_RK: Tensor, *weights: Weight
    ) -> Tensor:
        pow2 = mlp.fp8.recipe.expert_inputs.rounding.pow2
        x_PD = sorting.expand(InFp8.of(kept_x, x_RD.shape[1]), pow2=pow2)
        y_PD, kept = mlp.forward(x_PD, sorting.to_padded(weights_RK))
        ctx.save_for_backward(*kept_x, weights_RK, *kept)
        ctx.mlp, ctx.sorting, ctx.width = mlp, sorting, x_RD.shape[1]
        return sorting.reduce(y_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, weights_RK, *kept = ctx.saved_tensors
        mlp, sorting, width = ctx.mlp, ctx.sorting, ctx.width
        recipe = mlp.fp8.recipe
        inputs, gradients, columns_of = (
            recipe.expert_inputs,
            recipe.expert_gradients,
            recipe.weight_gradients.columns_of,
        )
        dy_PD = sorting.expand(gradients.rows(dy_RD.contiguous()), pow2=gradients.pow2)

        def x_DP() -> Rows:
            x_RD = InFp8.of((values, scales), width)
            return columns_of(sorting.expand(x_RD, pow2=inputs.rounding.pow2))

        dx_PD, d_weight_P = mlp.backward(
            tuple(kept),
            sorting.to_padded(weights_RK),
            dy_PD,
            lambda: columns_of(dy_PD),
            x_DP,
        )
        d_weights_RK = sorting.from_padded(d_weight_P).to(weights_RK.dtype)
        return None, None, None, sorting.reduce(dx_PD), d_weights_RK, None, None


def fp8_experts(
    x_RD: Tensor, weights_RK: Tensor, sorting: Sorting, gate_up: Weight, down: Weight, fp8: Fp8
) -> Tensor:
    """For every received row the sum over its experts on this rank of W_down (weight * swiglu(W_gate_up x)): [R, D].
    Experts may have no rows."""
    kept_x = fp8.recompute.derived(fp8.recipe.expert_inputs.keep, x_RD.detach().contiguous())
    mlp = Mlp(fp8, gate_up, down, x_RD.dtype, sorting.groups)
    return _Experts.apply(mlp, sorting, kept_x, x_RD, weights_RK, gate_up, down)
