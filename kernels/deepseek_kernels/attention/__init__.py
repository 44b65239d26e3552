"""Attention of MLA's heads, causal and, where documents share a sequence, within the document alone: a token sees
itself and what is before it in its own document. Softmax in FP32 (V3 report section 2.1.1; FlashAttention-2, Dao 2023).

Legend: B batch, T time, H heads, Q query/key size (``nope`` + rope; 192 in V3, 128 of them nope), V value size (128).
Strides may be any; where the last axis is not contiguous, tensors are copied.
"""

import torch
from torch import Tensor

from deepseek_kernels.registry import define
from deepseek_kernels.shapes import check_shape


def _fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_starts: Tensor | None, nope: int
) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    return q.new_empty(b, t, h, v.shape[3]), q.new_empty(b, h, t, dtype=torch.float32)


def _fake_backward(
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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_BACKENDS = ("reference", "triton", "torch", "ext")
_attention = define(
    __name__,
    "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? document_starts, int nope, *, str backend)"
    " -> (Tensor, Tensor)",
    _fake,
    _BACKENDS,
)
_attention_backward = define(
    __name__,
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " Tensor? document_starts, int nope, *, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _BACKENDS,
)


def attention(
    q_BTHQ: Tensor,
    k_BTHQ: Tensor,
    v_BTHV: Tensor,
    scale: float,
    document_starts_BT: Tensor | None,
    *,
    nope: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, and the natural logarithm of each softmax's sum: out_BTHV, lse_BHT (FP32).

    ``document_starts_BT`` (int32): the first position of each position's document, which neither decreases along T nor
    passes the position itself; None: each row is one document. BF16 or FP32; the reference also takes FP64, and then
    gives lse in FP64. A NaN in a key makes the queries that see it NaN and no others; one in a value may reach more.
    Raises ``ValueError`` for shapes, types and scales that do not fit, ``BackendUnavailable`` where a backend lacks the
    case.
    """
    _check(q_BTHQ, k_BTHQ, v_BTHV, scale, document_starts_BT, nope)
    return _attention(q_BTHQ, k_BTHQ, v_BTHV, scale, document_starts_BT, nope, backend=backend)


def attention_backward(
    d_out_BTHV: Tensor,
    q_BTHQ: Tensor,
    k_BTHQ: Tensor,
    v_BTHV: Tensor,
    out_BTHV: Tensor,
    lse_BHT: Tensor,
    scale: float,
    document_starts_BT: Tensor | None,
    *,
    nope: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq_BTHQ, dk_BTHQ, dv_BTHV of ``attention``, given its results; the same bits in every run (``torch``
    and ``ext``: as their libraries do)."""
    _check(q_BTHQ, k_BTHQ, v_BTHV, scale, document_starts_BT, nope)
    if d_out_BTHV.shape != v_BTHV.shape or out_BTHV.shape != v_BTHV.shape:
        raise ValueError(
            f"d_out {tuple(d_out_BTHV.shape)} or out {tuple(out_BTHV.shape)} is not shaped like v"
        )
    b, t, h, _ = q_BTHQ.shape
    check_shape("attention_backward", "lse", lse_BHT, (b, h, t), "q", q_BTHQ.shape)
    return _attention_backward(
        d_out_BTHV,
        q_BTHQ,
        k_BTHQ,
        v_BTHV,
        out_BTHV,
        lse_BHT,
        scale,
        document_starts_BT,
        nope,
        backend=backend,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None, nope: int) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if not 0 < nope < q.shape[3]:
        raise ValueError(f"nope is {nope}, must be between 0 and the query size {q.shape[3]}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: must be of one type")
    if not scale > 0:
        raise ValueError(f"scale is {scale}, must be positive")
    if starts is not None and (starts.shape != q.shape[:2] or starts.dtype != torch.int32):
        raise ValueError(f"document_starts is {starts.dtype} {tuple(starts.shape)}, must be int32 [B, T]")
