"""The kernels of SwiGLU. A program has a tile of rows and 128 channels (or fewer, of one tile); a pointer that is None
is not there. WHOLE: F is a multiple of 128, so that a tile of ``gate_up`` lies in one half and has one scale a row.
Legend: see the package; S stride of the rows of ``gate_up``, R and C rows and channels of a program.
"""

import triton
import triton.language as tl

from deepseek_kernels.tile_math import inverse_of, scale_of


@triton.jit
def place(F, R: tl.constexpr, C: tl.constexpr):
    """Rows and first channel of a program; what runs together reads one stretch of memory."""
    across = tl.cdiv(F, C)
    m = (tl.program_id(0) // across).to(tl.int64) * R + tl.arange(0, R)
    return m, tl.program_id(0) % across * C


@triton.jit
def load(x_ptr, scale_ptr, m, first, c, inside, M, S, WHOLE: tl.constexpr):
    """FP32 [R, C] of columns ``first`` + ``c``; ``first`` is that of the tile where they lie in one."""
    x = tl.load(x_ptr + m[:, None] * S + first + c, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        if WHOLE:
            x *= tl.load(scale_ptr + first // 128 * M + m, mask=m < M, other=0.0)[:, None]
        else:
            x *= tl.load(scale_ptr + (first + c) // 128 * M + m[:, None], mask=inside, other=0.0)
    return x


@triton.jit
def weighted(y, weight_ptr, m, M):
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), half as many instructions as by division."""
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def activation(x_ptr, scale_ptr, weight_ptr, m, first, c, inside, M, F, S, WHOLE: tl.constexpr):
    gate = load(x_ptr, scale_ptr, m, first, c, inside, M, S, WHOLE)
    up = load(x_ptr, scale_ptr, m, F + first, c, inside, M, S, WHOLE)
    return weighted(gate * sigmoid(gate) * up, weight_ptr, m, M)


@triton.jit
def forward_kernel(x_ptr, weight_ptr, y_ptr, M, F, S, R: tl.constexpr):
    m, first = place(F, R, 128)
    c = tl.arange(0, 128)[None, :]
    inside = (m < M)[:, None] & (first + c < F)
    y = activation(x_ptr, None, weight_ptr, m, first, c, inside, M, F, S, True)
    tl.store(y_ptr + m[:, None] * F + first + c, y, mask=inside)


@triton.jit
def rows_kernel(
    x_ptr, scale_ptr, weight_ptr, value_ptr, y_scale_ptr, M, F, S, FP,
    R: tl.constexpr, WHOLE: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    m, first = place(F, R, 128)
    c = tl.arange(0, 128)[None, :]
    inside = (m < M)[:, None] & (first + c < F)
    y = activation(x_ptr, scale_ptr, weight_ptr, m, first, c, inside, M, F, S, WHOLE)
    y = tl.where(inside, y, 0.0)  # 0 * NaN must not get into the padding
    scale = scale_of(tl.max(tl.abs(y), axis=1), POW2)
    values = (y * inverse_of(scale, POW2)[:, None]).to(tl.float8e4nv)
    tl.store(value_ptr + m[:, None] * FP + first + c, values, mask=(m < M)[:, None])
    tl.store(y_scale_ptr + first // 128 * M + m, scale, mask=m < M)


@triton.jit
def columns_kernel(
    x_ptr, scale_ptr, weight_ptr, value_ptr, y_scale_ptr, M, F, S, MP,
    C: tl.constexpr, WHOLE: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """128 rows x C channels: one tile of each channel."""
    m, first = place(F, 128, C)
    c = tl.arange(0, C)[None, :]
    inside = (m < M)[:, None] & (first + c < F)
    y = activation(x_ptr, scale_ptr, weight_ptr, m, first, c, inside, M, F, S, WHOLE)
    scale = scale_of(tl.max(tl.abs(y), axis=0), POW2)[None, :]
    values = (y * inverse_of(scale, POW2)).to(tl.float8e4nv)
    tl.store(value_ptr + (first + c).to(tl.int64) * MP + m[:, None], values, mask=first + c < F)
    tile = tl.program_id(0) // tl.cdiv(F, C)
    tl.store(y_scale_ptr + tile.to(tl.int64) * F + first + c, scale, mask=first + c < F)


@triton.jit
def gradients(dy, gate, up, weight_ptr, m, M):
    """d_gate, d_up, and what adds up to d_weight."""
    s = sigmoid(gate)
    silu, dyw = gate * s, weighted(dy, weight_ptr, m, M)
    return dyw * up * (s * (1.0 + gate * (1.0 - s))), dyw * silu, dy * silu * up


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, scale_ptr, weight_ptr, dx_ptr, part_ptr, M, F, S, R: tl.constexpr, WHOLE: tl.constexpr
):
    m, first = place(F, R, 128)
    c = tl.arange(0, 128)[None, :]
    inside = (m < M)[:, None] & (first + c < F)
    dy = load(dy_ptr, None, m, first, c, inside, M, F, True)
    gate = load(x_ptr, scale_ptr, m, first, c, inside, M, S, WHOLE)
    up = load(x_ptr, scale_ptr, m, F + first, c, inside, M, S, WHOLE)
    d_gate, d_up, terms = gradients(dy, gate, up, weight_ptr, m, M)
    at = dx_ptr + m[:, None] * (2 * F) + first + c
    tl.store(at, d_gate, mask=inside)
    tl.store(at + F, d_up, mask=inside)
    if weight_ptr is not None:
        tl.store(part_ptr + first // 128 * M + m, tl.sum(terms, axis=1), mask=m < M)


@triton.jit
def store_both(
    d, value_ptr, row_scale_ptr, turned_ptr, column_scale_ptr, m, first, M, MP, W, POW2: tl.constexpr
):
    """128 x 128 of d_gate_up at column ``first``, in tiles of either kind."""
    tile = tl.program_id(0) // (W // 256)
    c = first + tl.arange(0, 128)
    scale = scale_of(tl.max(tl.abs(d), axis=1), POW2)
    values = (d * inverse_of(scale, POW2)[:, None]).to(tl.float8e4nv)
    tl.store(value_ptr + m[:, None] * W + c[None, :], values, mask=(m < M)[:, None])
    tl.store(row_scale_ptr + first // 128 * M + m, scale, mask=m < M)
    scale = scale_of(tl.max(tl.abs(d), axis=0), POW2)
    values = (d * inverse_of(scale, POW2)[None, :]).to(tl.float8e4nv)
    tl.store(turned_ptr + c[None, :].to(tl.int64) * MP + m[:, None], values)
    tl.store(column_scale_ptr + tile.to(tl.int64) * W + c, scale)


@triton.jit
def backward_quantise_kernel(
    dy_ptr, x_ptr, scale_ptr, weight_ptr, value_ptr, row_scale_ptr, turned_ptr, column_scale_ptr, part_ptr,
    M, F, S, MP, POW2: tl.constexpr,
):  # fmt: skip
    """128 rows x 128 channels, F a multiple of 128."""
    m, first = place(F, 128, 128)
    c = tl.arange(0, 128)[None, :]
    inside = (m < M)[:, None]
    dy = load(dy_ptr, None, m, first, c, inside, M, F, True)
    gate = load(x_ptr, scale_ptr, m, first, c, inside, M, S, True)
    up = load(x_ptr, scale_ptr, m, F + first, c, inside, M, S, True)
    d_gate, d_up, terms = gradients(dy, gate, up, weight_ptr, m, M)
    if weight_ptr is not None:
        tl.store(part_ptr + first // 128 * M + m, tl.sum(terms, axis=1), mask=m < M)
    store_both(d_gate, value_ptr, row_scale_ptr, turned_ptr, column_scale_ptr, m, first, M, MP, 2 * F, POW2)
    store_both(d_up, value_ptr, row_scale_ptr, turned_ptr, column_scale_ptr, m, F + first, M, MP, 2 * F, POW2)
