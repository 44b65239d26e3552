"""Causal attention as torch has it: cuDNN's on a GPU, the fused one of the CPU elsewhere. Both give the logarithms of
the softmax's sums and have a backward of their own, so nothing is run twice. Neither knows documents.

The ops are called by name, not through ``scaled_dot_product_attention``: that would choose, and where cuDNN declines it
falls back to kernels that hold the whole matrix of weights.
"""

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.machine import BackendUnavailable

_ATEN = torch.ops.aten


def _check(q: Tensor, v: Tensor, document_starts: Tensor | None) -> None:
    if document_starts is not None:
        raise BackendUnavailable("torch has no attention within documents. Use triton, ext or reference")
    widths = (q.shape[3], v.shape[3])
    if q.is_cuda and (q.dtype != torch.bfloat16 or any(w % 8 or w > 256 for w in widths)):
        raise BackendUnavailable(
            f"cuDNN's attention takes bfloat16 heads of a multiple of 8 up to 256, not {q.dtype} of {widths}. "
            f"Use triton or reference"
        )
    if q.is_cuda and q.shape[1] == 1:
        raise BackendUnavailable(
            "cuDNN's attention takes no sequence of a single token. Use triton or reference"
        )


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Columns of zeros change no product."""
    width = max(x.shape[3] for x in tensors)
    return tuple(functional.pad(x, (0, width - x.shape[3])) for x in tensors)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_starts: Tensor | None, nope: int
) -> tuple[Tensor, Tensor]:
    _check(q, v, document_starts)
    if not q.numel():
        return torch.empty_like(v), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    if q.is_cuda:
        out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2), lse.squeeze(3)
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(*_one_width(q, k, v)), 0.0, True, scale=scale
    )
    return out.transpose(1, 2)[..., : v.shape[3]].contiguous(), lse


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    document_starts: Tensor | None,
    nope: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, v, document_starts)
    if not q.numel():
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.is_cuda:
        t, no_seed = q.shape[1], torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = _ATEN._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(d_out.contiguous(), q, k, v, out),
            lse.contiguous().unsqueeze(3),
            *(no_seed, no_seed, None, None, None),
            *(t, t, 0.0, True),
            scale=scale,
        )
    else:
        dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(*_one_width(d_out, q, k, v, out)), lse, 0.0, True, scale=scale
        )
    return tuple(dx.transpose(1, 2)[..., : x.shape[3]] for dx, x in ((dq, q), (dk, k), (dv, v)))
