"""W_down swiglu(W_gate_up x) in FP8, for one network or for experts with a group of rows each: the middle that
``feed_forward`` and ``experts`` share.

What waits for the backward pass is the input, in FP8 already, and gate_up; what SwiGLU made of it is made again.
Legend: M rows (of experts: sorted and padded), D hidden, F feed-forward size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.formats import Groups, Rows
from deepseek_train.fp8.room import Fp8
from deepseek_train.fp8.storage import Kept
from deepseek_train.fp8.swiglu import swiglu_forward, swiglu_gradients
from deepseek_train.phases.wgrad import Weight


@dataclass(frozen=True)
class Mlp:
    """Two weights, [2F, D] and [D, F] (of experts with a leading axis), and the precision between products."""

    fp8: Fp8
    gate_up: Weight
    down: Weight
    dtype: torch.dtype
    groups: Groups | None = None

    def forward(self, x_MD: Rows, weight_M: Tensor | None) -> tuple[Tensor, Kept]:
        """The result [M, D] and what is kept of gate_up. ``weight``: a factor for each row, inside."""
        fp8 = self.fp8
        gate_up = fp8.forward(x_MD, self.gate_up, self.dtype, self.groups)
        y_MF = swiglu_forward(gate_up, weight_M, fp8.recipe, fp8.kernels.swiglu)
        y_MD = fp8.forward(y_MF, self.down, self.dtype, self.groups)
        return y_MD, fp8.recipe.swiglu_inputs.keep(gate_up)

    def backward(
        self,
        kept: Kept,
        weight_M: Tensor | None,
        dy_MD: Rows,
        dy_DM: Callable[[], Rows],
        x_DM: Callable[[], Rows],
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the input [M, D] and of ``weight``. Weight gradients are queued; their operands' other halves
        ``dy_DM`` and ``x_DM`` are asked for when they run."""
        fp8, groups, gate_up, down = self.fp8, self.groups, self.gate_up, self.down
        stored = fp8.recipe.swiglu_inputs.held(kept, gate_up.shape[-2])
        dy_MF = fp8.backward(dy_MD, down, self.dtype, groups)
        grads = swiglu_gradients(stored, weight_M, dy_MF, fp8.recipe, fp8.kernels.swiglu)
        dx_MD = fp8.backward(grads.d_gate_up, gate_up, self.dtype, groups)
        y_t, d_gate_up_t = grads.y_t, grads.d_gate_up_t
        fp8.queue.add(lambda: fp8.add_gradient(down, dy_DM(), y_t, groups))
        fp8.queue.add(lambda: fp8.add_gradient(gate_up, d_gate_up_t, x_DM(), groups))
        return dx_MD, grads.d_weight_M
