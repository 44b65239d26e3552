"""The kernels of SwiGLU. A program has a tile of rows and 128 channels (or fewer, of one tile); a pointer that is None
is not there. WHOLE: F is a multiple of 128, so that a tile of ``gate_up`` lies in one half and has one scale a row.
Legend: see the package; S stride of the rows of ``gate_up``, R and C rows and channels of a program.
"""

import triton
import triton.language as tl

from deepseek_kernels.quant.column_kernels import store_four, store_fourths, turned
from deepseek_kernels.quant.row_kernels import store_rows
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
    if not WHOLE:
        y = tl.where(inside, y, 0.0)  # 0 * NaN must not get into the padding
    scale = scale_of(tl.max(tl.abs(y), axis=1), POW2)
    values = (y * inverse_of(scale, POW2)[:, None]).to(tl.float8e4nv)
    tl.store(value_ptr + m[:, None] * FP + first + c, values, mask=(m < M)[:, None])
    tl.store(y_scale_ptr + first // 128 * M + m, scale, mask=m < M)


@triton.jit
def activation_fourth(
    x_ptr, scale_ptr, weight_ptr, tile, J: tl.constexpr, first, M, F, S, C: tl.constexpr, WHOLE: tl.constexpr
):
    """Every fourth row of 128, from the J-th on: [32, C]."""
    m = tile.to(tl.int64) * 128 + 4 * tl.arange(0, 32) + J
    c = tl.arange(0, C)[None, :]
    inside = (m < M)[:, None] & (first + c < F)
    return activation(x_ptr, scale_ptr, weight_ptr, m, first, c, inside, M, F, S, WHOLE)


@triton.jit
def columns_kernel(
    x_ptr, scale_ptr, weight_ptr, value_ptr, y_scale_ptr, M, F, S, MP,
    C: tl.constexpr, WHOLE: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """128 rows x C channels: one tile of each channel, by four turns (see ``quant.column_kernels``)."""
    tile, first = tl.program_id(0) // tl.cdiv(F, C), tl.program_id(0) % tl.cdiv(F, C) * C
    y0 = activation_fourth(x_ptr, scale_ptr, weight_ptr, tile, 0, first, M, F, S, C, WHOLE)
    y1 = activation_fourth(x_ptr, scale_ptr, weight_ptr, tile, 1, first, M, F, S, C, WHOLE)
    y2 = activation_fourth(x_ptr, scale_ptr, weight_ptr, tile, 2, first, M, F, S, C, WHOLE)
    y3 = activation_fourth(x_ptr, scale_ptr, weight_ptr, tile, 3, first, M, F, S, C, WHOLE)
    store_rows(turned(y0, y1, y2, y3, C), value_ptr, y_scale_ptr, first, tile, F, MP, POW2, C)


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
def gradients_fourth(dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, J: tl.constexpr, first, M, F, S):
    """``gradients`` of every fourth row of 128, from the J-th on: [32, 128], [32, 128], [32]."""
    m = tile.to(tl.int64) * 128 + 4 * tl.arange(0, 32) + J
    c = tl.arange(0, 128)[None, :]
    inside = (m < M)[:, None]
    dy = load(dy_ptr, None, m, first, c, inside, M, F, True)
    gate = load(x_ptr, scale_ptr, m, first, c, inside, M, S, True)
    up = load(x_ptr, scale_ptr, m, F + first, c, inside, M, S, True)
    d_gate, d_up, terms = gradients(dy, gate, up, weight_ptr, m, M)
    return d_gate, d_up, tl.sum(terms, axis=1)


@triton.jit
def store_both(
    x0, x1, x2, x3, value_ptr, row_scale_ptr, turned_ptr, column_scale_ptr, tile, g, M, MP, W,
    POW2: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """128 x 128 of d_gate_up in tiles of either kind, the g-th of their rows."""
    store_fourths(x0, x1, x2, x3, value_ptr, row_scale_ptr, tile, g, M, W, POW2, VECTOR)
    store_rows(turned(x0, x1, x2, x3, 128), turned_ptr, column_scale_ptr, g * 128, tile, W, MP, POW2, 128)


@triton.jit
def backward_quantise_kernel(
    dy_ptr, x_ptr, scale_ptr, weight_ptr, value_ptr, row_scale_ptr, turned_ptr, column_scale_ptr, part_ptr,
    M, F, S, MP, POW2: tl.constexpr, VECTOR: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """128 rows x 128 channels, F a multiple of 128. SPLIT: d_gate and d_up are programs of their own, neighbours, that
    read the same (the second from L2): half the registers, so two blocks fit where one did."""
    across = F // 128
    half = tl.program_id(0) % 2
    p = tl.program_id(0) // 2 if SPLIT else tl.program_id(0)
    tile, g = p // across, p % across
    if SPLIT:
        if half == 0:
            x0, up_side, t0 = gradients_fourth(
                dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 0, g * 128, M, F, S
            )
            x1, up_side, t1 = gradients_fourth(
                dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 1, g * 128, M, F, S
            )
            x2, up_side, t2 = gradients_fourth(
                dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 2, g * 128, M, F, S
            )
            x3, up_side, t3 = gradients_fourth(
                dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 3, g * 128, M, F, S
            )
            if weight_ptr is not None:
                store_four(t0, t1, t2, t3, part_ptr, tile, g, M)
        else:
            gate_side, x0, unused = gradients_fourth(
                dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 0, g * 128, M, F, S
            )
            gate_side, x1, unused = gradients_fourth(
                dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 1, g * 128, M, F, S
            )
            gate_side, x2, unused = gradients_fourth(
                dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 2, g * 128, M, F, S
            )
            gate_side, x3, unused = gradients_fourth(
                dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 3, g * 128, M, F, S
            )
        store_both(
            x0,
            x1,
            x2,
            x3,
            value_ptr,
            row_scale_ptr,
            turned_ptr,
            column_scale_ptr,
            tile,
            half * across + g,
            M,
            MP,
            2 * F,
            POW2,
            VECTOR,
        )
    else:
        a0, b0, t0 = gradients_fourth(dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 0, g * 128, M, F, S)
        a1, b1, t1 = gradients_fourth(dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 1, g * 128, M, F, S)
        a2, b2, t2 = gradients_fourth(dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 2, g * 128, M, F, S)
        a3, b3, t3 = gradients_fourth(dy_ptr, x_ptr, scale_ptr, weight_ptr, tile, 3, g * 128, M, F, S)
        if weight_ptr is not None:
            store_four(t0, t1, t2, t3, part_ptr, tile, g, M)
        store_both(
            a0,
            a1,
            a2,
            a3,
            value_ptr,
            row_scale_ptr,
            turned_ptr,
            column_scale_ptr,
            tile,
            g,
            M,
            MP,
            2 * F,
            POW2,
            VECTOR,
        )
        store_both(
            b0,
            b1,
            b2,
            b3,
            value_ptr,
            row_scale_ptr,
            turned_ptr,
            column_scale_ptr,
            tile,
            across + g,
            M,
            MP,
            2 * F,
            POW2,
            VECTOR,
        )
