"""Attention of the flash-attn-4 package (``flash_attn.cute``), which has 192/128 heads, forward and backward, on Hopper
and packed documents too.

Written after its README and the signatures of its ``interface.py``, and NEVER RUN: no machine of ours has had it.
``flash_attn_func`` and ``flash_attn_varlen_func`` are public; that the backward alone can be called is not
(``_flash_attn_bwd``), so a later version may rename it.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from deepseek_kernels.machine import BackendUnavailable


def _library() -> ModuleType:
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        raise BackendUnavailable(
            f"attention: backend 'ext' needs the package flash-attn-4, which cannot be imported: {error}"
        ) from error


def _borders(document_starts_BT: Tensor) -> Tensor:
    """int32 [documents + 1]: where each begins in the batch laid end to end, and where the last ends. Waits for the
    GPU: how many there are is the shape of the answer."""
    b, t = document_starts_BT.shape
    at_T = torch.arange(t, device=document_starts_BT.device)
    firsts = (document_starts_BT == at_T).flatten().nonzero().flatten()
    return torch.cat([firsts, firsts.new_tensor([b * t])]).int()


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_starts: Tensor | None, nope: int
) -> tuple[Tensor, Tensor]:
    library = _library()
    if document_starts is None:
        return library.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, return_lse=True)
    b, t, h, _ = q.shape
    borders = _borders(document_starts)
    out, lse_HN = library.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        max_seqlen_q=t,
        max_seqlen_k=t,
        softmax_scale=scale,
        causal=True,
        return_lse=True,
    )
    return out.unflatten(0, (b, t)), lse_HN.unflatten(1, (b, t)).transpose(0, 1)


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
    library = _library()
    same = {"softmax_scale": scale, "causal": True, "deterministic": True}
    if document_starts is None:
        return library._flash_attn_bwd(q, k, v, out, d_out, lse, **same)
    b, t = q.shape[:2]
    borders = _borders(document_starts)
    gradients = library._flash_attn_bwd(
        *(x.flatten(0, 1) for x in (q, k, v, out, d_out)),
        lse.transpose(0, 1).flatten(1).contiguous(),
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        max_seqlen_q=t,
        max_seqlen_k=t,
        **same,
    )
    return tuple(x.unflatten(0, (b, t)) for x in gradients)
