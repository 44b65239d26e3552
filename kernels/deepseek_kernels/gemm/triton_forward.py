"""The product of rows and blocks as a Triton kernel: forward and input gradients, dense or grouped by expert.

What bounds it on Hopper is that promotion, ``sum += scale * tile``, runs on other units than the tensor cores but has
to wait for them, and that shared memory is filled from L2. So a program computes 128 x 192 outputs, the largest tile
whose sums and tile results both stay in registers, in two products: 128 columns, and 64 more that run while the 128 are
promoted. The result of the 64 is carried to the next step, past the wait for the next 128, where Triton lets it go on
asynchronously. Keep that order, and see the gate: the compiler serialises products it cannot prove apart.

Legend: see ``formats``; G tiles of 128 along K.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(tile, tiles_m, tiles_n, BAND: tl.constexpr):
    """Row and column of a tile: down the rows of a band, which share what they read of b while it is in L2, then on to
    the next column."""
    first = tile // (BAND * tiles_n) * BAND
    height = tl.minimum(tiles_m - first, BAND)
    inside = tile % (BAND * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def forward_kernel(
    a,
    b,
    b_half,
    y,
    y_half,
    a_scale_ptr,
    b_scale_ptr,
    expert_ptr,
    M,
    NP,
    G,
    tiles_m,
    tiles_n,
    WIDE: tl.constexpr,
    BAND: tl.constexpr,
):
    """``a`` [M, KP], ``b`` [E NP, KP], ``y`` [M, N]: descriptors, all of blocks 128 x 128 but those of ``_half``, which
    are 64 columns of ``y`` (64 rows of ``b``). ``expert_ptr``: for each tile of rows, or None. Without ``WIDE`` tiles
    are 128 x 128 and the halves are left alone."""
    blocks = NP // 128
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = place_of(tile, tiles_m, tiles_n, BAND)
        expert = 0
        if expert_ptr is not None:
            expert = tl.load(expert_ptr + m)
        # 192 columns are one whole block of b and half a block, before it or after it.
        if WIDE:
            whole = (n * 192 + 64) // 128
            half = n * 192 + (1 - n % 2) * 128
        else:
            whole = n
            half = n * 128
        # What lies beyond N is computed from whatever is there, and not stored.
        scales = b_scale_ptr + (expert * blocks + tl.minimum(whole, blocks - 1)) * G
        scales_half = b_scale_ptr + (expert * blocks + tl.minimum(half // 128, blocks - 1)) * G
        rows = m * 128 + tl.arange(0, 128)
        total = tl.zeros((128, 128), tl.float32)
        total_half = tl.zeros((128, 64), tl.float32)
        late = tl.zeros((128, 64), tl.float32)
        late_scale = tl.zeros((128,), tl.float32)
        # Scales are read one step ahead: their latency must not add to the tensor cores'.
        next_a = tl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
        next_b = tl.load(scales)
        next_half = tl.load(scales_half)
        for g in tl.range(G):
            x = a.load([m * 128, g * 128])
            w = b.load([expert * NP + whole * 128, g * 128])
            if WIDE:
                w_half = b_half.load([expert * NP + half, g * 128])
            a_scale, b_scale, half_scale = next_a, next_b, next_half
            ahead = tl.minimum(g + 1, G - 1)
            next_a = tl.load(a_scale_ptr + ahead.to(tl.int64) * M + rows, mask=rows < M, other=0.0)
            next_b = tl.load(scales + ahead)
            next_half = tl.load(scales_half + ahead)
            product = tl.dot(x, w.T, out_dtype=tl.float32)
            if WIDE:
                total_half += late * late_scale[:, None]
                late_scale = a_scale * half_scale
                late = tl.dot(x, w_half.T, out_dtype=tl.float32)
            total += product * (a_scale * b_scale)[:, None]
        y.store([m * 128, whole * 128], total.to(y.dtype))
        if WIDE:
            total_half += late * late_scale[:, None]
            y_half.store([m * 128, half], total_half.to(y.dtype))
