"""SwiGLU in plain torch. Legend: see the package."""

import torch
from torch import Tensor

from deepseek_kernels.quant.reference import dequantise, quantise_both, quantise_columns, quantise_rows


def _halves(gate_up: Tensor, scales: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    wide = gate_up.float() if scales is None else dequantise(gate_up, scales, width, torch.float32)
    gate_MF, up_MF = wide.chunk(2, -1)
    return gate_MF, up_MF


def _weighted(y_MF: Tensor, weight: Tensor | None) -> Tensor:
    return y_MF if weight is None else y_MF * weight.float().unsqueeze(-1)


def _activation(gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None) -> Tensor:
    gate_MF, up_MF = _halves(gate_up, scales, width)
    return _weighted(gate_MF * gate_MF.sigmoid() * up_MF, weight)


def swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    return _activation(gate_up, None, gate_up.shape[1], weight).to(gate_up.dtype)


def swiglu_quantise(
    gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor]:
    return quantise_rows(_activation(gate_up, scales, width, weight), pow2)


def swiglu_quantise_columns(
    gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor]:
    return quantise_columns(_activation(gate_up, scales, width, weight), pow2)


def _gradients(
    dy: Tensor, gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    gate_MF, up_MF = _halves(gate_up, scales, width)
    s_MF = gate_MF.sigmoid()
    silu_MF, slope_MF = gate_MF * s_MF, s_MF * (1.0 + gate_MF * (1.0 - s_MF))
    weighted_MF = _weighted(dy.float(), weight)
    d_gate_up = torch.cat([weighted_MF * up_MF * slope_MF, weighted_MF * silu_MF], -1)
    if weight is None:
        return d_gate_up, dy.new_empty(0)
    return d_gate_up, (dy.float() * silu_MF * up_MF).sum(-1).to(weight.dtype)


def swiglu_backward(
    dy: Tensor, gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    d_gate_up, d_weight = _gradients(dy, gate_up, scales, width, weight)
    return d_gate_up.to(dy.dtype), d_weight


def swiglu_backward_quantise(
    dy: Tensor, gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_gate_up, d_weight = _gradients(dy, gate_up, scales, width, weight)
    return *quantise_both(d_gate_up, pow2), d_weight
