"""What the attention kernels share: tiles of heads, and which keys a query sees.

Tiles that stay for a whole program are loaded through pointers: Triton then keeps such left operands of ``tl.dot`` in
shared memory, and not, as behind a descriptor and a reshape, in registers. Those that stream by come through
descriptors (TMA), which need neither registers for addresses nor masks: beyond the tensor they read zeros.
"""

import triton
import triton.language as tl


@triton.jit
def streamed(view, batch, row, head, R: tl.constexpr, C: tl.constexpr):
    """[R, C] of a descriptor over [B, T, H, width], from ``row`` on."""
    return view.load([batch, row, head, 0]).reshape(R, C)


@triton.jit
def head_at(ptr, batch, row, head, stride_b, stride_t, stride_h):
    """Where a head of a position begins. 64 bits: long sequences of many heads pass 2^31 elements."""
    there = tl.cast(batch, tl.int64) * stride_b + tl.cast(row, tl.int64) * stride_t
    return ptr + there + tl.cast(head, tl.int64) * stride_h


@triton.jit
def load_rows(ptr, stride, left, R: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """[R, C] from ``ptr`` on, ``stride`` elements from row to row; zeros beyond ``left`` rows and W columns."""
    row = tl.arange(0, R)[:, None]
    column = tl.arange(0, C)[None, :]
    if W < C:
        tile = tl.load(ptr + row * stride + column, mask=(row < left) & (column < W), other=0.0)
    else:
        tile = tl.load(ptr + row * stride + column, mask=row < left, other=0.0)
    return tile


@triton.jit
def store_rows(ptr, stride, left, tile, R: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    row = tl.arange(0, R)[:, None]
    column = tl.arange(0, C)[None, :]
    at = ptr + row * stride + column
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(row < left) & (column < W))


@triton.jit
def blocks_of_keys(starts_ptr, batch, m0, T, DOCS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Blocks of BN keys that queries m0 .. m0 + BM see: some see those from ``low`` on, all see all of those from
    ``full`` on, some again see those from ``diagonal`` on, none those from ``end`` on. But for ``end``: multiples of
    BN."""
    end = tl.minimum(m0 + BM, T)
    diagonal = m0 // BN * BN
    low = 0
    full = 0
    if DOCS:
        low = tl.load(starts_ptr + batch * T + m0) // BN * BN
        full = tl.minimum(tl.cdiv(tl.load(starts_ptr + batch * T + end - 1), BN) * BN, diagonal)
    return low, full, diagonal, end
