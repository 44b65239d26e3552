"""Backward in two kernels without atomics, so that every run gives the same bits (FlashAttention-2, algorithm 2):

    P = exp(scale Q K^T - lse),   delta = sum of out * dO along a row,   dS = P * (dO V^T - delta)
    dQ = scale dS K,              dK = scale dS^T Q,                     dV = P^T dO

dQ goes by queries and comes first: it leaves delta, and lse in powers of two, in rows padded to whole blocks, for dK
and dV, which go by keys and work on transposed tiles [keys, queries], so that P^T and dS^T are left operands as they
are.
"""

import triton
import triton.language as tl

from deepseek_kernels.attention.tiles import blocks_of_keys, head_at, load_rows, store_rows, streamed

LOG2_OF_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _keys(
    dq_nope, dq_rope, q_nope, q_rope, d_out, lse, delta, k_nope, k_rope, v, batch, head, n, row, start, scale,
    MASKED: tl.constexpr, DOCS: tl.constexpr, NC: tl.constexpr, RC: tl.constexpr, VC: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dQ / scale what the BN keys from n on do. ``scale`` and ``lse`` are in powers of two."""
    k_n = streamed(k_nope, batch, n, head, BN, NC)
    k_r = streamed(k_rope, batch, n, head, BN, RC)
    s = tl.dot(q_nope, k_n.T, input_precision=PRECISION)
    s = tl.dot(q_rope, k_r.T, s, input_precision=PRECISION)
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        key = n + tl.arange(0, BN)[None, :]
        seen = key <= row[:, None]
        if DOCS:
            seen = seen & (key >= start[:, None])
        p = tl.where(seen, p, 0.0)
    values = streamed(v, batch, n, head, BN, VC)
    dp = tl.dot(d_out, values.T, input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(k_n.dtype)
    dq_nope = tl.dot(ds, k_n, dq_nope, input_precision=PRECISION)
    dq_rope = tl.dot(ds, k_r, dq_rope, input_precision=PRECISION)
    return dq_nope, dq_rope


@triton.jit
def dq_kernel(
    q_ptr, out_ptr, d_out_ptr, k_nope, k_rope, v, lse_ptr, lse_2_ptr, delta_ptr, dq_ptr, starts_ptr,
    scale, T, TP, H, q_b, q_t, q_h, out_b, out_t, out_h, d_b, d_t, d_h,
    DOCS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    NC: tl.constexpr, RC: tl.constexpr, VC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM queries of a head, longest rows first. TP: T padded to a multiple of BM."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    left = T - m0
    row = m0 + tl.arange(0, BM)
    start = row
    if DOCS:
        start = tl.load(starts_ptr + batch * T + row, mask=row < T, other=0)
    d_out = load_rows(head_at(d_out_ptr, batch, m0, head, d_b, d_t, d_h), d_t, left, BM, VALUE, VC)
    out = load_rows(head_at(out_ptr, batch, m0, head, out_b, out_t, out_h), out_t, left, BM, VALUE, VC)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + tl.program_id(1) * T + row, mask=row < T, other=0.0) * LOG2_OF_E
    tl.store(delta_ptr + tl.program_id(1) * TP + row, delta)
    tl.store(lse_2_ptr + tl.program_id(1) * TP + row, lse)
    q_ptr = head_at(q_ptr, batch, m0, head, q_b, q_t, q_h)
    q_nope = load_rows(q_ptr, q_t, left, BM, NOPE, NC)
    q_rope = load_rows(q_ptr + NOPE, q_t, left, BM, ROPE, RC)
    dq_nope = tl.zeros((BM, NC), tl.float32)
    dq_rope = tl.zeros((BM, RC), tl.float32)
    scale_2 = scale * LOG2_OF_E
    low, full, diagonal, end = blocks_of_keys(starts_ptr, batch, m0, T, DOCS, BM, BN)
    for n in tl.range(full, diagonal, BN):
        dq_nope, dq_rope = _keys(
            dq_nope, dq_rope, q_nope, q_rope, d_out, lse, delta, k_nope, k_rope, v, batch, head, n, row, start,
            scale_2, False, DOCS, NC, RC, VC, BN, PRECISION,
        )  # fmt: skip
    early = full - low
    for i in tl.range(0, early + end - diagonal, BN):
        n = tl.where(i < early, low + i, diagonal + i - early)
        dq_nope, dq_rope = _keys(
            dq_nope, dq_rope, q_nope, q_rope, d_out, lse, delta, k_nope, k_rope, v, batch, head, n, row, start,
            scale_2, True, DOCS, NC, RC, VC, BN, PRECISION,
        )  # fmt: skip
    dq_t = H * (NOPE + ROPE)
    dq_ptr = head_at(dq_ptr, batch, m0, head, tl.cast(T, tl.int64) * dq_t, dq_t, NOPE + ROPE)
    store_rows(dq_ptr, dq_t, left, dq_nope * scale, BM, NOPE, NC)
    store_rows(dq_ptr + NOPE, dq_t, left, dq_rope * scale, BM, ROPE, RC)


@triton.jit
def dkdv_kernel(
    k_ptr, v_ptr, q_nope, q_rope, d_out, lse_2_ptr, delta_ptr, dk_ptr, dv_ptr, starts_ptr, ends_ptr,
    scale, T, TP, H, k_b, k_t, k_h, v_b, v_t, v_h,
    DOCS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    NC: tl.constexpr, RC: tl.constexpr, VC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN keys of a head; the first, which most queries see, first. ``ends``: for each block, where the document of its
    last key ends. One loop, every block masked: a second loop without a mask would not leave enough registers (Triton
    3.6.0). Queries beyond T are zeros, and so is what they add."""
    n0 = tl.program_id(0) * BN
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    left = T - n0
    key = n0 + tl.arange(0, BN)[:, None]
    k_ptr = head_at(k_ptr, batch, n0, head, k_b, k_t, k_h)
    k_n = load_rows(k_ptr, k_t, left, BN, NOPE, NC)
    k_r = load_rows(k_ptr + NOPE, k_t, left, BN, ROPE, RC)
    values = load_rows(head_at(v_ptr, batch, n0, head, v_b, v_t, v_h), v_t, left, BN, VALUE, VC)
    dk_nope = tl.zeros((BN, NC), tl.float32)
    dk_rope = tl.zeros((BN, RC), tl.float32)
    dv = tl.zeros((BN, VC), tl.float32)
    statistics = tl.program_id(1) * TP
    end = T
    if DOCS:
        end = tl.load(ends_ptr + batch * tl.num_programs(0) + tl.program_id(0))
    for m in tl.range(n0, end, BM):
        row = m + tl.arange(0, BM)
        q_n = streamed(q_nope, batch, m, head, BM, NC)
        q_r = streamed(q_rope, batch, m, head, BM, RC)
        d_o = streamed(d_out, batch, m, head, BM, VC)
        lse = tl.load(lse_2_ptr + (statistics + row))
        s = tl.dot(k_n, q_n.T, input_precision=PRECISION)
        s = tl.dot(k_r, q_r.T, s, input_precision=PRECISION)
        p = tl.exp2(s * (scale * LOG2_OF_E) - lse[None, :])
        seen = key <= row[None, :]
        if DOCS:
            start = tl.load(starts_ptr + (batch * T + row), mask=row < T, other=0)
            seen = seen & (key >= start[None, :])
        p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(d_o.dtype), d_o, dv, input_precision=PRECISION)
        dp = tl.dot(values, d_o.T, input_precision=PRECISION)
        delta = tl.load(delta_ptr + (statistics + row))
        ds = (p * (dp - delta[None, :])).to(q_n.dtype)
        dk_nope = tl.dot(ds, q_n, dk_nope, input_precision=PRECISION)
        dk_rope = tl.dot(ds, q_r, dk_rope, input_precision=PRECISION)
    dk_t = H * (NOPE + ROPE)
    dk_ptr = head_at(dk_ptr, batch, n0, head, tl.cast(T, tl.int64) * dk_t, dk_t, NOPE + ROPE)
    store_rows(dk_ptr, dk_t, left, dk_nope * scale, BN, NOPE, NC)
    store_rows(dk_ptr + NOPE, dk_t, left, dk_rope * scale, BN, ROPE, RC)
    dv_t = H * VALUE
    dv_ptr = head_at(dv_ptr, batch, n0, head, tl.cast(T, tl.int64) * dv_t, dv_t, VALUE)
    store_rows(dv_ptr, dv_t, left, dv, BN, VALUE, VC)
