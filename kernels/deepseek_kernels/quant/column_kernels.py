"""Triton kernels that transpose: 128 tokens x C channels in, C rows of 128 one-byte values out.

The tokens lie in four tiles, tile j those with number 4 i + j: four bytes that will be neighbours are then one word of
one thread, and the transpose in shared memory moves words. Legend: see ``formats``; S elements from row to row,
MW = padded M / 4 words.
"""

import triton
import triton.language as tl

from deepseek_kernels.tile_math import four_in_a_word, inverse_of, scale_of

COLUMNS, COLUMNS_LAUNCH = 64, {"num_warps": 8, "num_stages": 1}
BOTH_LAUNCH = {"num_warps": 8, "num_stages": 1}
REQUANTISE, REQUANTISE_LAUNCH = 64, {"num_warps": 8, "num_stages": 1}
TRANSPOSE, TRANSPOSE_LAUNCH = 128, {"num_warps": 8, "num_stages": 1}


@triton.jit
def _tokens(x_ptr, first, J: tl.constexpr, channel, M, K, S):
    """Tokens first + 4 i + J of these channels, in FP32, 0 beyond the matrix."""
    m = first + 4 * tl.arange(0, 32) + J
    inside = (m < M)[:, None] & (channel < K)[None, :]
    at = (4 * tl.arange(0, 32) + J)[:, None] * S + channel[None, :]
    return tl.load(x_ptr + first.to(tl.int64) * S + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _amax(x):
    return tl.max(tl.abs(x), axis=0)


@triton.jit
def _store_columns(a, b, c, d, value_ptr, scale_ptr, first, channel, K, MW, POW2: tl.constexpr):
    """Quantises the four tiles by column and stores them transposed."""
    amax = tl.maximum(tl.maximum(_amax(a), _amax(b)), tl.maximum(_amax(c), _amax(d)))
    scale = scale_of(amax, POW2)
    inverse = inverse_of(scale)[None, :]
    words = four_in_a_word(
        (a * inverse).to(tl.float8e4nv),
        (b * inverse).to(tl.float8e4nv),
        (c * inverse).to(tl.float8e4nv),
        (d * inverse).to(tl.float8e4nv),
    )
    tl.store(scale_ptr + (first // 128).to(tl.int64) * K + channel, scale, mask=channel < K)
    _store_words(words, value_ptr, first, channel, K, MW)


@triton.jit
def _store_words(words, value_ptr, first, channel, K, MW):
    at = channel.to(tl.int64)[:, None] * MW + (first // 4 + tl.arange(0, 32))[None, :]
    tl.store(value_ptr + at, tl.trans(words), mask=(channel < K)[:, None])


@triton.jit
def columns_kernel(x_ptr, value_ptr, scale_ptr, M, K, S, MW, POW2: tl.constexpr, C: tl.constexpr):
    across = tl.cdiv(K, C)
    first = tl.program_id(0) // across * 128
    channel = tl.program_id(0) % across * C + tl.arange(0, C)
    a = _tokens(x_ptr, first, 0, channel, M, K, S)
    b = _tokens(x_ptr, first, 1, channel, M, K, S)
    c = _tokens(x_ptr, first, 2, channel, M, K, S)
    d = _tokens(x_ptr, first, 3, channel, M, K, S)
    _store_columns(a, b, c, d, value_ptr, scale_ptr, first, channel, K, MW, POW2)


@triton.jit
def _store_rows(x, value_ptr, scale_ptr, first, J: tl.constexpr, g, channel, M, KP, POW2: tl.constexpr):
    """Quantises tokens first + 4 i + J by row."""
    row = 4 * tl.arange(0, 32) + J
    scale = scale_of(tl.max(tl.abs(x), axis=1), POW2)
    values = (x * inverse_of(scale)[:, None]).to(tl.float8e4nv)
    at = row[:, None] * KP + channel[None, :]
    tl.store(value_ptr + first.to(tl.int64) * KP + at, values, mask=(first + row < M)[:, None])
    tl.store(scale_ptr + g.to(tl.int64) * M + first + row, scale, mask=first + row < M)


@triton.jit
def both_kernel(
    x_ptr, value_ptr, scale_ptr, value_t_ptr, scale_t_ptr, M, K, S, KP, MW, POW2: tl.constexpr
):
    across = KP // 128
    first = tl.program_id(0) // across * 128
    g = tl.program_id(0) % across
    channel = g * 128 + tl.arange(0, 128)
    a = _tokens(x_ptr, first, 0, channel, M, K, S)
    b = _tokens(x_ptr, first, 1, channel, M, K, S)
    c = _tokens(x_ptr, first, 2, channel, M, K, S)
    d = _tokens(x_ptr, first, 3, channel, M, K, S)
    _store_rows(a, value_ptr, scale_ptr, first, 0, g, channel, M, KP, POW2)
    _store_rows(b, value_ptr, scale_ptr, first, 1, g, channel, M, KP, POW2)
    _store_rows(c, value_ptr, scale_ptr, first, 2, g, channel, M, KP, POW2)
    _store_rows(d, value_ptr, scale_ptr, first, 3, g, channel, M, KP, POW2)
    _store_columns(a, b, c, d, value_t_ptr, scale_t_ptr, first, channel, K, MW, POW2)


@triton.jit
def _scaled_tokens(x_ptr, scale_ptr, first, J: tl.constexpr, channel, g, M, K, S):
    m = first + 4 * tl.arange(0, 32) + J
    scale = tl.load(scale_ptr + g.to(tl.int64) * M + m, mask=m < M, other=0.0)
    return _tokens(x_ptr, first, J, channel, M, K, S) * scale[:, None]


@triton.jit
def requantise_kernel(
    x_ptr, x_scale_ptr, value_ptr, scale_ptr, M, K, S, MW, POW2: tl.constexpr, C: tl.constexpr
):
    across = tl.cdiv(K, C)
    first = tl.program_id(0) // across * 128
    start = tl.program_id(0) % across * C
    g = start // 128
    channel = start + tl.arange(0, C)
    a = _scaled_tokens(x_ptr, x_scale_ptr, first, 0, channel, g, M, K, S)
    b = _scaled_tokens(x_ptr, x_scale_ptr, first, 1, channel, g, M, K, S)
    c = _scaled_tokens(x_ptr, x_scale_ptr, first, 2, channel, g, M, K, S)
    d = _scaled_tokens(x_ptr, x_scale_ptr, first, 3, channel, g, M, K, S)
    _store_columns(a, b, c, d, value_ptr, scale_ptr, first, channel, K, MW, POW2)


@triton.jit
def _bytes(x_ptr, J: tl.constexpr, channel, K):
    return tl.load(x_ptr + (4 * tl.arange(0, 32) + J)[:, None] * K + channel[None, :])


@triton.jit
def transpose_kernel(x_ptr, y_ptr, N, K, C: tl.constexpr):
    """[E, N, K] bytes to [E, K, N]; N and K multiples of 128."""
    across = K // C
    block_row = tl.program_id(0) // across  # over all experts
    channel = tl.program_id(0) % across * C + tl.arange(0, C)
    expert = (block_row // (N // 128)).to(tl.int64)
    first = block_row % (N // 128) * 128
    x_ptr += block_row.to(tl.int64) * 128 * K
    words = four_in_a_word(
        _bytes(x_ptr, 0, channel, K), _bytes(x_ptr, 1, channel, K),
        _bytes(x_ptr, 2, channel, K), _bytes(x_ptr, 3, channel, K),
    )
    _store_words(words, y_ptr + expert * K * (N // 4), first, channel, K, N // 4)
