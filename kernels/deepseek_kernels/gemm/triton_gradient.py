"""The product of rows and rows added to what is there, as a Triton kernel: weight gradients, which contract over
tokens, dense or for each expert over its own.

Here both scales differ along the tile, 128 more of them in registers, so a tile is 128 x 128: 64 rows, and 64 more that
run while the first are promoted (see ``triton_forward``). K is never split between programs: the order of every sum is
fixed.

Legend: see ``formats``; G tiles of 128 along K; E experts.
"""

import triton
import triton.language as tl

from deepseek_kernels.gemm.triton_forward import place_of


@triton.jit
def _add(into_ptr, rows, columns, M, PITCH, total):
    at = into_ptr + rows.to(tl.int64)[:, None] * PITCH + columns[None, :]
    inside = (rows < M)[:, None] & (columns < PITCH)[None, :]
    tl.store(at, tl.load(at, mask=inside) + total, mask=inside)


@triton.jit
def gradient_kernel(
    a,
    b,
    a_scale_ptr,
    b_scale_ptr,
    into_ptr,
    start_ptr,
    M,
    N,
    PITCH,
    G,
    E,
    tiles_m,
    tiles_n,
    HALVES: tl.constexpr,
    BAND: tl.constexpr,
):
    """``a`` [M, KP] and ``b`` [N, KP]: descriptors of blocks 128 x 128, but 64 x 128 of ``a`` with ``HALVES``; ``into``
    [E, M, PITCH], rows that begin at multiples of 16 elements; what is beyond N gets zeros added. ``start_ptr``: where
    the experts' columns begin [E + 1], or None for one expert that has them all."""
    ROWS: tl.constexpr = 64 if HALVES else 128
    tiles = tiles_m * tiles_n
    for tile in tl.range(tl.program_id(0), E * tiles, tl.num_programs(0)):
        expert = tile // tiles
        m, n = place_of(tile % tiles, tiles_m, tiles_n, BAND)
        first, last = 0, G
        if start_ptr is not None:
            first = tl.load(start_ptr + expert) // 128
            last = tl.load(start_ptr + expert + 1) // 128
        if last > first:  # an expert without rows keeps what it has
            rows = m * 128 + tl.arange(0, ROWS)
            columns = n * 128 + tl.arange(0, 128)
            total = tl.zeros((ROWS, 128), tl.float32)
            total_low = tl.zeros((ROWS, 128), tl.float32)
            late = tl.zeros((ROWS, 128), tl.float32)
            late_a = tl.zeros((ROWS,), tl.float32)
            late_b = tl.zeros((128,), tl.float32)
            for g in tl.range(first, last):
                x = a.load([m * 128, g * 128])
                w = b.load([n * 128, g * 128])
                a_scales = a_scale_ptr + tl.cast(g, tl.int64) * M + rows
                a_scale = tl.load(a_scales, mask=rows < M, other=0.0)
                b_scales = b_scale_ptr + tl.cast(g, tl.int64) * N + columns
                b_scale = tl.load(b_scales, mask=columns < N, other=0.0)
                if HALVES:
                    x_low = a.load([m * 128 + 64, g * 128])
                    low_scale = tl.load(a_scales + 64, mask=rows + 64 < M, other=0.0)
                product = tl.dot(x, w.T, out_dtype=tl.float32)
                if HALVES:
                    total_low += late * late_b[None, :] * late_a[:, None]
                    late_a, late_b = low_scale, b_scale
                    late = tl.dot(x_low, w.T, out_dtype=tl.float32)
                total += product * b_scale[None, :] * a_scale[:, None]
            here = into_ptr + tl.cast(expert, tl.int64) * M * PITCH
            _add(here, rows, columns, M, PITCH, total)
            if HALVES:
                total_low += late * late_b[None, :] * late_a[:, None]
                _add(here, rows + 64, columns, M, PITCH, total_low)
