"""Forward: a program for BM queries of a head, keys in blocks of BN, softmax on the way (FlashAttention-2, algorithm
1).

Blocks that every query of the program sees whole come first and carry no mask; those on the diagonal and across a
border of documents follow in a second loop. The running maximum makes the order free.
"""

import triton
import triton.language as tl

from deepseek_kernels.attention.tiles import blocks_of_keys, head_at, load_rows, store_rows, streamed

LOWEST = tl.constexpr(-3.0e38)  # the first maximum; finite, or a row that has seen nothing yet would make NaN
LOG2_OF_E = tl.constexpr(1.4426950408889634)
LN_OF_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc, top, total, q_nope, q_rope, k_nope, k_rope, v, batch, head, n, row, start, scale,
    MASKED: tl.constexpr, DOCS: tl.constexpr, NC: tl.constexpr, RC: tl.constexpr, VC: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes in the BN keys from n on. ``scale`` and ``top`` are in powers of two."""
    k = streamed(k_nope, batch, n, head, BN, NC)
    s = tl.dot(q_nope, k.T, input_precision=PRECISION)
    k = streamed(k_rope, batch, n, head, BN, RC)
    s = tl.dot(q_rope, k.T, s, input_precision=PRECISION)
    if MASKED:
        key = n + tl.arange(0, BN)[None, :]
        seen = key <= row[:, None]
        if DOCS:
            seen = seen & (key >= start[:, None])
        s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(top - new)
    total = total * shrink + tl.sum(p, 1)
    values = streamed(v, batch, n, head, BN, VC)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new, total


@triton.jit
def forward_kernel(
    q_ptr, k_nope, k_rope, v, out_ptr, lse_ptr, starts_ptr, scale, T, H, q_b, q_t, q_h,
    DOCS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    NC: tl.constexpr, RC: tl.constexpr, VC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Longest rows first; programs that run together share the keys of a few heads."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    left = T - m0
    row = m0 + tl.arange(0, BM)
    start = row
    if DOCS:
        start = tl.load(starts_ptr + batch * T + row, mask=row < T, other=0)
    q_ptr = head_at(q_ptr, batch, m0, head, q_b, q_t, q_h)
    q_nope = load_rows(q_ptr, q_t, left, BM, NOPE, NC)
    q_rope = load_rows(q_ptr + NOPE, q_t, left, BM, ROPE, RC)
    acc = tl.zeros((BM, VC), tl.float32)
    top = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    scale_2 = scale * LOG2_OF_E
    low, full, diagonal, end = blocks_of_keys(starts_ptr, batch, m0, T, DOCS, BM, BN)
    for n in tl.range(full, diagonal, BN):
        acc, top, total = _attend(
            acc, top, total, q_nope, q_rope, k_nope, k_rope, v, batch, head, n, row, start, scale_2,
            False, DOCS, NC, RC, VC, BN, PRECISION,
        )  # fmt: skip
    early = full - low
    for i in tl.range(0, early + end - diagonal, BN):
        n = tl.where(i < early, low + i, diagonal + i - early)
        acc, top, total = _attend(
            acc, top, total, q_nope, q_rope, k_nope, k_rope, v, batch, head, n, row, start, scale_2,
            True, DOCS, NC, RC, VC, BN, PRECISION,
        )  # fmt: skip
    out_t = H * VALUE
    out_ptr = head_at(out_ptr, batch, m0, head, tl.cast(T, tl.int64) * out_t, out_t, VALUE)
    store_rows(out_ptr, out_t, left, acc / total[:, None], BM, VALUE, VC)
    lse = (top + tl.log2(total)) * LN_OF_2
    tl.store(lse_ptr + tl.program_id(1) * T + row, lse, mask=row < T)
