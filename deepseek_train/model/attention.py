"""Causal attention as one function of autograd. The formula: ``deepseek_kernels.attention``.

Legend: B batch, T time, H heads, Q query/key size (``nope`` + rope), V value size.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels.attention import attention, attention_backward


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, nope: int, backend: str) -> Tensor:
        out_BTHV, lse_BHT = attention(q, k, v, scale, None, nope=nope, backend=backend)
        ctx.save_for_backward(q, k, v, out_BTHV, lse_BHT)
        ctx.scale, ctx.nope, ctx.backend = scale, nope, backend
        return out_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out_BTHV, lse_BHT = ctx.saved_tensors
        gradients = attention_backward(
            dy_BTHV, q, k, v, out_BTHV, lse_BHT, ctx.scale, None, nope=ctx.nope, backend=ctx.backend
        )
        return *gradients, None, None, None


def attend(
    q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor, *, scale: float, nope: int, backend: str
) -> Tensor:
    """Causal softmax(scale q k^T) v: [B, T, H, V]."""
    return _Attend.apply(q_BTHQ, k_BTHQ, v_BTHV, scale, nope, backend)
