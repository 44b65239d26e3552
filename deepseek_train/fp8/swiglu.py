"""SwiGLU between two FP8 products: V3's rule is one kernel each way, coarser ones go by way of FP32.

Legend: M rows, F feed-forward size; gate_up [M, 2F] with the gate half first, as it was computed or as it was kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.formats import Rows
from deepseek_kernels.quant import dequantise
from deepseek_kernels.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_backward_quantise,
    swiglu_quantise,
    swiglu_quantise_columns,
)
from deepseek_train.fp8.recipe import Recipe
from deepseek_train.fp8.rounding import both


@dataclass(frozen=True)
class SwigluGradients:
    """What the backward pass makes of gate_up and the gradient of the result."""

    d_gate_up: Rows  # [M, 2F], for the input gradient
    d_gate_up_t: Rows  # [2F, M], for the weight gradient of the first matrix
    y_t: Rows  # the result once more, [F, M], for the weight gradient of the second
    d_weight_M: Tensor | None  # of the routing weights


def swiglu_forward(gate_up: Tensor, weight_M: Tensor | None, recipe: Recipe, backend: str) -> Rows:
    """silu(gate) * up, each row times its routing weight if given: [M, F], the second product's operand."""
    rule = recipe.activations
    if rule.tile == "1x128":
        return swiglu_quantise(gate_up, weight_M, pow2=rule.pow2, backend=backend)
    return rule.rows(swiglu(gate_up.float(), weight_M, backend=backend))


def swiglu_gradients(
    gate_up: Tensor | Rows, weight_M: Tensor | None, dy_MF: Tensor, recipe: Recipe, backend: str
) -> SwigluGradients:
    """All that the backward pass needs. ``y_t`` is made at once, although its product may be queued: waiting, it takes
    half the bytes of gate_up in FP8 (a quarter of those in BF16), which can then be freed."""
    rows, columns = recipe.gradients, recipe.weight_gradients
    if columns.tile == "1x128":
        y_t = swiglu_quantise_columns(gate_up, weight_M, pow2=columns.pow2, backend=backend)
    else:
        wide = dequantise(gate_up, torch.float32, backend=backend) if isinstance(gate_up, Rows) else gate_up
        y_t = columns.columns(swiglu(wide.float(), weight_M, backend=backend))
    if rows == columns and rows.tile == "1x128":
        straight, transposed, d_weight_M = swiglu_backward_quantise(
            dy_MF, gate_up, weight_M, pow2=rows.pow2, backend=backend
        )
        return SwigluGradients(straight, transposed, y_t, d_weight_M)
    d_gate_up, d_weight_M = swiglu_backward(dy_MF.float(), gate_up, weight_M, backend=backend)
    return SwigluGradients(*both(rows, columns, d_gate_up), y_t, d_weight_M)
