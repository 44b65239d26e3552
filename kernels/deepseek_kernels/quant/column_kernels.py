"""Triton kernels that transpose: 128 tokens x C channels in, C rows of 128 tokens out.

The tokens are loaded as four tiles, each every fourth of them: four neighbours are then registers of one thread. Joined
they become four neighbouring bytes without any move, so that the turn through shared memory, which the compiler places
before the store, is one of 32-bit words of one-byte values, the fewest there are.
Legend: see ``formats``; S elements from row to row, KP, MP = padded K, M.
"""

import triton
import triton.language as tl

from deepseek_kernels.quant.row_kernels import store_rows, store_values

# Of each kernel: channels of a program, tiles of tokens that go before the next channels (see ``place``), launch.
COLUMNS, COLUMNS_LAUNCH = (64, 1), {"num_warps": 4, "num_stages": 1}
BOTH, BOTH_LAUNCH = (128, 1), {"num_warps": 8, "num_stages": 1}
# Of BF16 to powers of two at most; None: as it comes. With 80 three blocks fit, not two: 0.278 ms for [32768, 7168] on
# an H200 instead of 0.351. Triton 3.6 fits them in; 3.9 would spill.
BOTH_REGISTERS: int | None = 80 if triton.__version__.startswith("3.6.") else None
REQUANTISE, REQUANTISE_LAUNCH = (128, 1), {"num_warps": 4, "num_stages": 1}
TRANSPOSE, TRANSPOSE_LAUNCH = (128, 8), {"num_warps": 4, "num_stages": 1}


def both_launch(itemsize: int, pow2: bool) -> dict[str, int]:
    few = BOTH_REGISTERS is not None and itemsize == 2 and pow2
    return BOTH_LAUNCH | ({"maxnreg": BOTH_REGISTERS} if few else {})


def both_vector(itemsize: int) -> int:
    """Of BF16 rows are stored as they were loaded, 8 values at once. FP32 would be 4, and need more registers."""
    return 8 if itemsize == 2 else 16


@triton.jit
def place(across, down, TALL: tl.constexpr):
    """Which tile of tokens, and which channels of it, a program has. What runs together reads one stretch of memory;
    with TALL > 1, so many tiles of tokens for the same channels, it also writes longer ones."""
    if TALL == 1:
        tile = tl.program_id(0) // across
        g = tl.program_id(0) % across
    else:
        strip = tl.program_id(0) // (TALL * across)
        inside = tl.program_id(0) % (TALL * across)
        high = tl.minimum(down - strip * TALL, TALL)
        tile = strip * TALL + inside % high
        g = inside // high
    return tile, g


@triton.jit
def fourth(x_ptr, first, J: tl.constexpr, channel, M, K, S):
    """Tokens first + 4 i + J of these channels, as they are: [32, C], 0 beyond the matrix."""
    row = 4 * tl.arange(0, 32) + J
    inside = (first + row < M)[:, None] & (channel < K)[None, :]
    x_ptr += first.to(tl.int64) * S
    return tl.load(x_ptr + row[:, None] * S + channel[None, :], mask=inside, other=0.0)


@triton.jit
def turned(x0, x1, x2, x3, C: tl.constexpr):
    """Four of ``fourth`` -> [C, 128]."""
    x = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (32, C, 4))
    return tl.reshape(tl.permute(x, (1, 0, 2)), (C, 128))


@triton.jit
def store_fourths(
    x0, x1, x2, x3, value_ptr, scale_ptr, tile, g, M, KP, POW2: tl.constexpr, VECTOR: tl.constexpr
):
    """Four of ``fourth`` in tiles of 1 x 128. Their scales become neighbours before they are stored, once."""
    s0 = store_values(x0, value_ptr, tile * 128, 4, 0, g, M, KP, POW2, 32, VECTOR)
    s1 = store_values(x1, value_ptr, tile * 128, 4, 1, g, M, KP, POW2, 32, VECTOR)
    s2 = store_values(x2, value_ptr, tile * 128, 4, 2, g, M, KP, POW2, 32, VECTOR)
    s3 = store_values(x3, value_ptr, tile * 128, 4, 3, g, M, KP, POW2, 32, VECTOR)
    store_four(s0, s1, s2, s3, scale_ptr, tile, g, M)


@triton.jit
def store_four(s0, s1, s2, s3, ptr, tile, g, M):
    """One number for each row of four ``fourth``, to [.., M]."""
    row = tile * 128 + tl.arange(0, 128)
    all_four = tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (128,))
    tl.store(ptr + g.to(tl.int64) * M + row, all_four, mask=row < M)


@triton.jit
def columns_kernel(
    x_ptr, value_ptr, scale_ptr, M, K, S, MP, POW2: tl.constexpr, C: tl.constexpr, TALL: tl.constexpr
):
    tile, g = place(tl.cdiv(K, C), MP // 128, TALL)
    start = g * C
    channel = start + tl.arange(0, C)
    x0 = fourth(x_ptr, tile * 128, 0, channel, M, K, S).to(tl.float32)
    x1 = fourth(x_ptr, tile * 128, 1, channel, M, K, S).to(tl.float32)
    x2 = fourth(x_ptr, tile * 128, 2, channel, M, K, S).to(tl.float32)
    x3 = fourth(x_ptr, tile * 128, 3, channel, M, K, S).to(tl.float32)
    store_rows(turned(x0, x1, x2, x3, C), value_ptr, scale_ptr, start, tile, K, MP, POW2, C)


@triton.jit
def both_kernel(
    x_ptr,
    value_ptr,
    scale_ptr,
    value_t_ptr,
    scale_t_ptr,
    M,
    K,
    S,
    KP,
    MP,
    POW2: tl.constexpr,
    C: tl.constexpr,
    TALL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """C = 128: a tile of either kind. VECTOR: see ``both_vector``."""
    tile, g = place(KP // C, MP // 128, TALL)
    channel = g * C + tl.arange(0, C)
    x0 = fourth(x_ptr, tile * 128, 0, channel, M, K, S).to(tl.float32)
    x1 = fourth(x_ptr, tile * 128, 1, channel, M, K, S).to(tl.float32)
    x2 = fourth(x_ptr, tile * 128, 2, channel, M, K, S).to(tl.float32)
    x3 = fourth(x_ptr, tile * 128, 3, channel, M, K, S).to(tl.float32)
    store_fourths(x0, x1, x2, x3, value_ptr, scale_ptr, tile, g, M, KP, POW2, VECTOR)
    store_rows(turned(x0, x1, x2, x3, C), value_t_ptr, scale_t_ptr, g * C, tile, K, MP, POW2, C)


@triton.jit
def _fourth_scaled(x_ptr, scale_ptr, first, J: tl.constexpr, channel, M, K, S):
    """``fourth`` times its scales [M], in FP32."""
    m = first + 4 * tl.arange(0, 32) + J
    scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)
    return fourth(x_ptr, first, J, channel, M, K, S).to(tl.float32) * scale[:, None]


@triton.jit
def requantise_kernel(
    x_ptr, x_scale_ptr, value_ptr, scale_ptr, M, K, S, MP, POW2: tl.constexpr, C: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """C divides 128: one scale for a token."""
    tile, g = place(tl.cdiv(K, C), MP // 128, TALL)
    start = g * C
    channel = start + tl.arange(0, C)
    x_scale_ptr += (start // 128).to(tl.int64) * M
    x0 = _fourth_scaled(x_ptr, x_scale_ptr, tile * 128, 0, channel, M, K, S)
    x1 = _fourth_scaled(x_ptr, x_scale_ptr, tile * 128, 1, channel, M, K, S)
    x2 = _fourth_scaled(x_ptr, x_scale_ptr, tile * 128, 2, channel, M, K, S)
    x3 = _fourth_scaled(x_ptr, x_scale_ptr, tile * 128, 3, channel, M, K, S)
    store_rows(turned(x0, x1, x2, x3, C), value_ptr, scale_ptr, start, tile, K, MP, POW2, C)


@triton.jit
def transpose_kernel(x_ptr, y_ptr, blocks, N, K, C: tl.constexpr, TALL: tl.constexpr):
    """[E, N, K] bytes to [E, K, N]; N and K multiples of 128. ``blocks``: of 128 rows, over all experts."""
    block_row, g = place(K // C, blocks, TALL)
    channel = g * C + tl.arange(0, C)
    expert = (block_row // (N // 128)).to(tl.int64)
    n = block_row % (N // 128) * 128
    x_ptr += expert * N * K
    x0 = fourth(x_ptr, n, 0, channel, N, K, K)
    x1 = fourth(x_ptr, n, 1, channel, N, K, K)
    x2 = fourth(x_ptr, n, 2, channel, N, K, K)
    x3 = fourth(x_ptr, n, 3, channel, N, K, K)
    at = (expert * K + channel)[:, None] * N + (n + tl.arange(0, 128))[None, :]
    tl.store(y_ptr + at, turned(x0, x1, x2, x3, C))
