"""Triton kernels along rows: tiles of R rows x 128 channels. Tiles of a row are neighbours in the grid: what runs
together reads one stretch of memory; R = 32 makes each store of scales, whose neighbours are rows, 128 bytes.
Legend: see ``formats``; S elements from row to row, NP, KP = padded N, K.
"""

import triton
import triton.language as tl

from deepseek_kernels.tile_math import inverse_of, scale_of

ROWS = 32
ROWS_LAUNCH = {"num_warps": 4, "num_stages": 1}
DEQUANTISE_LAUNCH = {"num_warps": 4, "num_stages": 1}
BLOCKS_LAUNCH = {"num_warps": 8, "num_stages": 1}


@triton.jit
def store_values(
    x, value_ptr, first, STEP: tl.constexpr, J: tl.constexpr, g, M, KP, POW2: tl.constexpr, R: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Quantises [R, 128], rows first + STEP i + J of M and the tile g of each. -> scales [R], still to be stored.
    VECTOR: values a thread stores at once, at most."""
    row = STEP * tl.arange(0, R) + J
    scale = scale_of(tl.max(tl.abs(x), axis=1), POW2)
    values = (x * inverse_of(scale, POW2)[:, None]).to(tl.float8e4nv)
    value_ptr += first.to(tl.int64) * KP + g * 128
    at = row.to(tl.int64)[:, None] * KP + tl.arange(0, 128)[None, :]
    tl.store(tl.max_contiguous(value_ptr + at, [1, VECTOR]), values, mask=(first + row < M)[:, None])
    return scale


@triton.jit
def store_rows(x, value_ptr, scale_ptr, first, g, M, KP, POW2: tl.constexpr, R: tl.constexpr):
    """Quantises [R, 128], rows from ``first`` of M and the tile g of each."""
    scale = store_values(x, value_ptr, first, 1, 0, g, M, KP, POW2, R, 16)
    row = first + tl.arange(0, R)
    tl.store(scale_ptr + g.to(tl.int64) * M + row, scale, mask=row < M)


@triton.jit
def rows_kernel(x_ptr, value_ptr, scale_ptr, M, K, S, KP, POW2: tl.constexpr, R: tl.constexpr):
    tiles = KP // 128
    first = tl.program_id(0) // tiles * R
    g = tl.program_id(0) % tiles
    row = tl.arange(0, R)
    k = g * 128 + tl.arange(0, 128)
    inside = (first + row < M)[:, None] & (k < K)[None, :]
    x_ptr += first.to(tl.int64) * S
    x = tl.load(x_ptr + row[:, None] * S + k[None, :], mask=inside, other=0.0).to(tl.float32)
    store_rows(x, value_ptr, scale_ptr, first, g, M, KP, POW2, R)


@triton.jit
def dequantise_kernel(value_ptr, scale_ptr, y_ptr, M, K, KP, R: tl.constexpr):
    tiles = KP // 128
    first = tl.program_id(0) // tiles * R
    g = tl.program_id(0) % tiles
    row = tl.arange(0, R)
    k = g * 128 + tl.arange(0, 128)
    inside = (first + row < M)[:, None]
    value_ptr += first.to(tl.int64) * KP
    values = tl.load(value_ptr + row[:, None] * KP + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + g.to(tl.int64) * M + first + row, mask=first + row < M, other=0.0)
    y = (values * scale[:, None]).to(y_ptr.dtype.element_ty)
    y_ptr += first.to(tl.int64) * K
    tl.store(y_ptr + row[:, None] * K + k[None, :], y, mask=inside & (k < K)[None, :])


@triton.jit
def blocks_kernel(w_ptr, value_ptr, scale_ptr, N, K, NP, KP, POW2: tl.constexpr):
    """One block of 128 x 128. Programs: experts, blocks of rows, blocks of a row."""
    across = KP // 128
    block_row = tl.program_id(0) // across  # over all experts
    g = tl.program_id(0) % across
    expert = block_row // (NP // 128)
    first = block_row % (NP // 128) * 128
    row = tl.arange(0, 128)
    k = g * 128 + tl.arange(0, 128)
    w_ptr += (expert.to(tl.int64) * N + first) * K
    inside = (first + row < N)[:, None] & (k < K)[None, :]
    w = tl.load(w_ptr + row[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(tl.abs(w), axis=1), axis=0), POW2)
    values = (w * inverse_of(scale, POW2)).to(tl.float8e4nv)
    value_ptr += block_row.to(tl.int64) * 128 * KP
    tl.store(value_ptr + row[:, None] * KP + k[None, :], values)
    tl.store(scale_ptr + tl.program_id(0), scale)
