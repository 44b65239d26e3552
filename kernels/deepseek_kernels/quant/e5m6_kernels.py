"""Triton kernels for E5M6, 12 bits a value.

Eight values are three words. Moved as they come, three words a thread, every access would touch each sector of memory
again; so the words of four groups lie side by side and go as three vectors of 16 bytes. Legend: see ``formats``; S
elements from row to row.
"""

import triton
import triton.language as tl

from deepseek_kernels.formats import LARGEST_E5M6 as _LARGEST_E5M6
from deepseek_kernels.tile_math import inverse_of, scale_of

LARGEST_E5M6 = tl.constexpr(_LARGEST_E5M6)
WORDS = 48  # of a tile: 128 values of 12 bits
PACK_ROWS, PACK_LAUNCH = 32, {"num_warps": 4, "num_stages": 1}
UNPACK_ROWS, UNPACK_LAUNCH = 32, {"num_warps": 4, "num_stages": 1}


@triton.jit
def _code(x):
    """12 bits: FP16 without its last 4, to nearest even; 0x7E0 for NaN, whose payload rounding would carry away."""
    bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(x == x, (bits + 7 + (bits >> 4 & 1)) >> 4, 0x7E0)


@triton.jit
def _eighths(x, R: tl.constexpr, C: tl.constexpr):
    """[R, 8 C] -> eight of [R, C]: every eighth value from the first, the second, ..."""
    even, odd = tl.split(tl.reshape(x, (R, C * 4, 2)))
    e0, e1 = tl.split(tl.reshape(even, (R, C * 2, 2)))
    o0, o1 = tl.split(tl.reshape(odd, (R, C * 2, 2)))
    a, e = tl.split(tl.reshape(e0, (R, C, 2)))
    c, g = tl.split(tl.reshape(e1, (R, C, 2)))
    b, f = tl.split(tl.reshape(o0, (R, C, 2)))
    d, h = tl.split(tl.reshape(o1, (R, C, 2)))
    return a, b, c, d, e, f, g, h


@triton.jit
def _quarters(w, R: tl.constexpr):
    """[R, 16] or [R, 4, 4] -> four of [R, 4]: every fourth word from the first, the second, ..."""
    even, odd = tl.split(tl.reshape(w, (R, 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _four(a, b, c, d):
    """Four of [R, 4] side by side: [R, 4, 2, 2]."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _in_a_row(p, q, r, R: tl.constexpr):
    """The first, second and third words of 16 groups -> [R, 4, 4, 4]: in each 12 words of 4 groups, and 4 idle ones."""
    p0, p1, p2, p3 = _quarters(p, R)
    q0, q1, q2, q3 = _quarters(q, R)
    r0, r1, r2, r3 = _quarters(r, R)
    first, second, third = _four(p0, q0, r0, p1), _four(q1, r1, p2, q2), _four(r2, p3, q3, r3)
    words = tl.join(tl.join(first, third), tl.join(second, third))
    return tl.reshape(tl.permute(words, (0, 1, 4, 5, 2, 3)), (R, 4, 4, 4))


@triton.jit
def pack_kernel(x_ptr, word_ptr, scale_ptr, M, K, S, tiles, R: tl.constexpr):
    first = tl.program_id(0) // tiles * R
    tile = tl.program_id(0) % tiles
    row = tl.arange(0, R)
    k = tile * 128 + tl.arange(0, 128)
    inside = (first + row < M)[:, None] & (k < K)[None, :]
    x_ptr += first.to(tl.int64) * S
    x = tl.load(x_ptr + row[:, None] * S + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), axis=1), True, LARGEST_E5M6)
    a, b, c, d, e, f, g, h = _eighths(_code(x * inverse_of(scale, True)[:, None]), R, 16)
    words = _in_a_row(
        a | b << 12 | c << 24, c >> 8 | d << 4 | e << 16 | f << 28, f >> 4 | g << 8 | h << 20, R
    )
    four = tl.arange(0, 4)
    group, vector = four[None, :, None, None], four[None, None, :, None]
    at = (
        row[:, None, None, None] * (tiles * 48)
        + tile * 48
        + group * 12
        + vector * 4
        + four[None, None, None, :]
    )
    word_ptr += first.to(tl.int64) * (tiles * 48)
    tl.store(word_ptr + at, words, mask=(first + row < M)[:, None, None, None] & (vector < 3))
    tl.store(scale_ptr + tile.to(tl.int64) * M + first + row, scale, mask=first + row < M)


@triton.jit
def _value(code):
    return ((code & 0xFFF) << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _vector(word_ptr, i, row, tile, tiles, inside, R: tl.constexpr):
    """The i-th of the three vectors of each four groups, as four words: [R, 4] each."""
    four = tl.arange(0, 4)
    at = (
        row[:, None, None] * (tiles * 48) + tile * 48 + four[None, :, None] * 12 + i * 4 + four[None, None, :]
    )
    return _quarters(
        tl.load(word_ptr + at, mask=inside[:, None, None], other=0).to(tl.uint32, bitcast=True), R
    )


@triton.jit
def _sixteen(a, b, c, d, R: tl.constexpr):
    """Undoes ``_quarters``: [R, 16]."""
    return tl.reshape(_four(a, b, c, d), (R, 16))


@triton.jit
def unpack_kernel(word_ptr, scale_ptr, y_ptr, M, K, tiles, R: tl.constexpr):
    first = tl.program_id(0) // tiles * R
    tile = tl.program_id(0) % tiles
    row = tl.arange(0, R)
    k = tile * 128 + tl.arange(0, 128)
    inside = first + row < M
    word_ptr += first.to(tl.int64) * (tiles * 48)
    p0, q0, r0, p1 = _vector(word_ptr, 0, row, tile, tiles, inside, R)
    q1, r1, p2, q2 = _vector(word_ptr, 1, row, tile, tiles, inside, R)
    r2, p3, q3, r3 = _vector(word_ptr, 2, row, tile, tiles, inside, R)
    p, q, r = _sixteen(p0, p1, p2, p3, R), _sixteen(q0, q1, q2, q3, R), _sixteen(r0, r1, r2, r3, R)
    ae = tl.join(p, q >> 16)
    cg = tl.join(p >> 24 | q << 8, r >> 8)
    bf = tl.join(p >> 12, q >> 28 | r << 4)
    dh = tl.join(q >> 4, r >> 20)
    even, odd = tl.reshape(tl.join(ae, cg), (R, 64)), tl.reshape(tl.join(bf, dh), (R, 64))
    scale = tl.load(scale_ptr + tile.to(tl.int64) * M + first + row, mask=inside, other=0.0)
    y = _value(tl.reshape(tl.join(even, odd), (R, 128))) * scale[:, None]
    y_ptr += first.to(tl.int64) * K
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * K + k[None, :], y, mask=inside[:, None] & (k < K)[None, :])
