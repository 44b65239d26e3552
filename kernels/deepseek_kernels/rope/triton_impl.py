"""Rotary position embedding as a Triton kernel. Legend: see ``rope``."""

import triton
import triton.language as tl
from torch import Tensor

# Without fusion products are rounded before they are added, as the reference does.
ROWS, LAUNCH = 32, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def rotate_kernel(
    x_ptr,
    turn_ptr,
    T,
    H,
    stride_b,
    stride_t,
    stride_h,
    INVERSE: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_P: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Some heads of some positions. SIZE_P: channels, padded to a power of two."""
    row, channel = tl.arange(0, POSITIONS * HEADS), tl.arange(0, SIZE_P)[None, :]
    t = tl.program_id(0).to(tl.int64) * POSITIONS + row // HEADS
    h = tl.program_id(1).to(tl.int64) * HEADS + row % HEADS
    inside = ((t < T) & (h < H))[:, None] & (channel < SIZE)
    at = x_ptr + tl.program_id(2).to(tl.int64) * stride_b
    at = at + (t * stride_t + h * stride_h)[:, None] + channel
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(turn_ptr + (t * SIZE)[:, None] + channel, mask=inside, other=0.0)
    a, b = tl.split(tl.reshape(x, (POSITIONS * HEADS, SIZE_P // 2, 2)))
    cos, sin = tl.split(tl.reshape(turn, (POSITIONS * HEADS, SIZE_P // 2, 2)))
    if INVERSE:
        sin = -sin
    y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (POSITIONS * HEADS, SIZE_P))
    tl.store(at, y.to(x_ptr.dtype.element_ty), mask=inside)


def rotate_(x_BTHR: Tensor, turns_TR2: Tensor, inverse: bool) -> None:
    batch, length, heads, size = x_BTHR.shape
    if x_BTHR.numel():
        block = min(ROWS, triton.next_power_of_2(heads))
        positions = ROWS // block
        grid = (triton.cdiv(length, positions), triton.cdiv(heads, block), batch)
        rotate_kernel[grid](
            x_BTHR,
            turns_TR2.contiguous(),
            length,
            heads,
            *x_BTHR.stride()[:3],
            inverse,
            size,
            triton.next_power_of_2(size),
            positions,
            block,
            **LAUNCH,
        )
