"""SwiGLU between two FP8 products, in the pieces that one kernel each can do (V3_SPEC D.3).

All in FP32, rounded to FP8 at once. Legend: M rows, F feed-forward size; gate_up [M, 2F] with the gate half first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.formats import Rows
from deepseek_train.fp8.recipe import Recipe
from deepseek_train.fp8.rounding import both


@dataclass(frozen=True)
class SwigluGradients:
    """What the backward pass makes of gate_up and the gradient of the result."""

    d_gate_up: Rows  # [M, 2F], for the input gradient
    d_gate_up_t: Rows  # [2F, M], for the weight gradient of the first matrix
    y_t: Rows  # the result once more, [F, M], for the weight gradient of the second
    d_weight_M: Tensor | None  # of the routing weights, FP32


def swiglu_quantise(gate_up: Tensor, weight_M: Tensor | None, recipe: Recipe) -> Rows:
    """silu(gate) * up, each row times its routing weight if given: [M, F], the second product's operand."""
    gate, up = gate_up.float().chunk(2, -1)
    return recipe.activations.rows(_weighted(functional.silu(gate) * up, weight_M))


def swiglu_backward_quantise(
    gate_up: Tensor, weight_M: Tensor | None, dy_MF: Tensor, recipe: Recipe
) -> SwigluGradients:
    """All that the backward pass needs, from gate_up as it was kept."""
    gate, up = gate_up.float().chunk(2, -1)
    dy, silu = dy_MF.float(), functional.silu(gate)
    y = silu * up
    d_weight_M = None if weight_M is None else (dy * y).sum(-1)
    d_y = _weighted(dy, weight_M)
    share = torch.sigmoid(gate)
    d_gate = d_y * up * share * (1.0 + gate * (1.0 - share))
    d_gate_up = torch.cat([d_gate, d_y * silu], -1)
    rows, columns = both(recipe.gradients, recipe.weight_gradients, d_gate_up)
    y_t = recipe.weight_gradients.columns(_weighted(y, weight_M))
    return SwigluGradients(rows, columns, y_t, d_weight_M)


def _weighted(x_MF: Tensor, weight_M: Tensor | None) -> Tensor:
    return x_MF if weight_M is None else x_MF * weight_M.float().unsqueeze(-1)
