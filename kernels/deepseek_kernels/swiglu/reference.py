"""SwiGLU in plain torch, in FP32 (FP64 for FP64): also what CPUs train with. Legend: see the package."""

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.quant.reference import dequantise, quantise_both, quantise_columns, quantise_rows


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _halves(gate_up: Tensor, scales: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    wide = _wide(gate_up) if scales is None else dequantise(gate_up, scales, width, torch.float32)
    gate_MF, up_MF = wide.chunk(2, -1)
    return gate_MF, up_MF


def _activation(gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None) -> Tensor:
    gate_MF, up_MF = _halves(gate_up, scales, width)
    y_MF = functional.silu(gate_MF).mul_(up_MF)
    return y_MF if weight is None else y_MF.mul_(weight.unsqueeze(-1))


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
    dy = _wide(dy)
    d_gate_up = dy.new_empty(len(dy), width)
    d_gate_MF, d_up_MF = d_gate_up.chunk(2, -1)
    torch.mul(dy, functional.silu(gate_MF), out=d_up_MF)
    d_silu_MF, d_weight = dy * up_MF, dy.new_empty(0)
    if weight is not None:
        d_weight = (d_up_MF * up_MF).sum(-1).to(weight.dtype)
        d_up_MF.mul_(weight.unsqueeze(-1))
        d_silu_MF.mul_(weight.unsqueeze(-1))
    torch.ops.aten.silu_backward.grad_input(d_silu_MF, gate_MF, grad_input=d_gate_MF)
    return d_gate_up, d_weight


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
