"""Triton kernels that transpose: 128 tokens x C channels in, C rows of 128 tokens out.

Tiles are turned first, as words of 32 bits, and quantised as rows afterwards: neighbouring tokens of a channel (two of
BF16, four of one byte) are loaded as separate tiles, lie in one word of one thread, and the turn in shared memory moves
words; after it a thread has 16 neighbouring tokens of few channels, so that largest values take no shared memory,
scales few divisions, and stores 16 bytes. Legend: see ``formats``; S elements from row to row, MP = padded M.
"""

import triton
import triton.language as tl

from deepseek_kernels.quant.row_kernels import store_rows

COLUMNS, COLUMNS_LAUNCH = 64, {"num_warps": 8, "num_stages": 1}
BOTH_LAUNCH = {"num_warps": 8, "num_stages": 1}
REQUANTISE, REQUANTISE_LAUNCH = 128, {"num_warps": 8, "num_stages": 1}
TRANSPOSE, TRANSPOSE_LAUNCH = 128, {"num_warps": 8, "num_stages": 1}


@triton.jit
def _every(x_ptr, first, STEP: tl.constexpr, J: tl.constexpr, channel, M, K, S):
    """Tokens first + STEP i + J of these channels, as they are; 0 beyond the matrix."""
    row = STEP * tl.arange(0, 128 // STEP) + J
    inside = (first + row < M)[:, None] & (channel < K)[None, :]
    x_ptr += first.to(tl.int64) * S
    return tl.load(x_ptr + row[:, None] * S + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _turned_halves(x0, x1, C: tl.constexpr):
    """Even and odd tokens, 2 x [64, C] of 16 bits -> [C, 128]."""
    low = x0.to(tl.uint16, bitcast=True).to(tl.uint32)
    high = x1.to(tl.uint16, bitcast=True).to(tl.uint32)
    words = tl.trans(low | (high << 16))
    halves = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(halves, (C, 128)).to(x0.dtype, bitcast=True)


@triton.jit
def _byte(x):
    return x.to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def _turned_words(x0, x1, x2, x3):
    """Every fourth token from the first, the second, ..., 4 x [32, C] of 8 bits -> [C, 32] words."""
    return tl.trans(_byte(x0) | (_byte(x1) << 8) | (_byte(x2) << 16) | (_byte(x3) << 24))


@triton.jit
def _turned_bytes(x0, x1, x2, x3, C: tl.constexpr):
    words = _turned_words(x0, x1, x2, x3)
    even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    return tl.reshape(tl.join(even, odd), (C, 128)).to(x0.dtype, bitcast=True)


@triton.jit
def columns_kernel(x_ptr, value_ptr, scale_ptr, M, K, S, MP, POW2: tl.constexpr, C: tl.constexpr):
    across = tl.cdiv(K, C)
    tile = tl.program_id(0) // across
    start = tl.program_id(0) % across * C
    channel = start + tl.arange(0, C)
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        x0 = _every(x_ptr, tile * 128, 2, 0, channel, M, K, S)
        x1 = _every(x_ptr, tile * 128, 2, 1, channel, M, K, S)
        turned = _turned_halves(x0, x1, C).to(tl.float32)
    else:
        turned = tl.trans(_every(x_ptr, tile * 128, 1, 0, channel, M, K, S))
    store_rows(turned, value_ptr, scale_ptr, start, 1, 0, tile, K, MP, POW2, C)


@triton.jit
def both_kernel(
    x_ptr, value_ptr, scale_ptr, value_t_ptr, scale_t_ptr, M, K, S, KP, MP, POW2: tl.constexpr
):
    across = KP // 128
    tile = tl.program_id(0) // across
    g = tl.program_id(0) % across
    channel = g * 128 + tl.arange(0, 128)
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        x0 = _every(x_ptr, tile * 128, 2, 0, channel, M, K, S)
        x1 = _every(x_ptr, tile * 128, 2, 1, channel, M, K, S)
        store_rows(x0.to(tl.float32), value_ptr, scale_ptr, tile * 128, 2, 0, g, M, KP, POW2, 64)
        store_rows(x1.to(tl.float32), value_ptr, scale_ptr, tile * 128, 2, 1, g, M, KP, POW2, 64)
        turned = _turned_halves(x0, x1, 128).to(tl.float32)
    else:
        x = _every(x_ptr, tile * 128, 1, 0, channel, M, K, S)
        store_rows(x, value_ptr, scale_ptr, tile * 128, 1, 0, g, M, KP, POW2, 128)
        turned = tl.trans(x)
    store_rows(turned, value_t_ptr, scale_t_ptr, g * 128, 1, 0, tile, K, MP, POW2, 128)


@triton.jit
def requantise_kernel(
    x_ptr, x_scale_ptr, value_ptr, scale_ptr, M, K, S, MP, POW2: tl.constexpr, C: tl.constexpr
):
    across = tl.cdiv(K, C)
    tile = tl.program_id(0) // across
    start = tl.program_id(0) % across * C
    channel = start + tl.arange(0, C)
    x0 = _every(x_ptr, tile * 128, 4, 0, channel, M, K, S)
    x1 = _every(x_ptr, tile * 128, 4, 1, channel, M, K, S)
    x2 = _every(x_ptr, tile * 128, 4, 2, channel, M, K, S)
    x3 = _every(x_ptr, tile * 128, 4, 3, channel, M, K, S)
    m = tile * 128 + tl.arange(0, 128)
    scale = tl.load(x_scale_ptr + (start // 128).to(tl.int64) * M + m, mask=m < M, other=0.0)
    turned = _turned_bytes(x0, x1, x2, x3, C).to(tl.float32) * scale[None, :]
    store_rows(turned, value_ptr, scale_ptr, start, 1, 0, tile, K, MP, POW2, C)


@triton.jit
def transpose_kernel(x_ptr, word_ptr, N, K, C: tl.constexpr):
    """[E, N, K] bytes to [E, K, N]; N and K multiples of 128."""
    across = K // C
    block_row = tl.program_id(0) // across  # over all experts
    channel = tl.program_id(0) % across * C + tl.arange(0, C)
    expert = (block_row // (N // 128)).to(tl.int64)
    x_ptr += expert * N * K
    n = block_row % (N // 128) * 128
    x0 = _every(x_ptr, n, 4, 0, channel, N, K, K)
    x1 = _every(x_ptr, n, 4, 1, channel, N, K, K)
    x2 = _every(x_ptr, n, 4, 2, channel, N, K, K)
    x3 = _every(x_ptr, n, 4, 3, channel, N, K, K)
    at = (expert * K + channel)[:, None] * (N // 4) + (n // 4 + tl.arange(0, 32))[None, :]
    tl.store(word_ptr + at, _turned_words(x0, x1, x2, x3))
