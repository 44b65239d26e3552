"""Rotary position embedding: adjacent pairs of channels turned as complex numbers (V2 report section 2.1.3).

Legend: B sequences, T positions, H heads, R rope channels (even).
"""

from torch import Tensor

from deepseek_kernels.registry import define
from deepseek_kernels.shapes import check_axes


def _fake_rotate_(x_BTHR: Tensor, turns_TR2: Tensor, inverse: bool) -> None:
    """Nothing new comes to be."""


_rotate_ = define(
    __name__,
    "rotate_(Tensor(a!) x, Tensor turns, bool inverse, *, str backend) -> ()",
    _fake_rotate_,
    ("reference", "triton", "torch"),
)


def rotate_(x_BTHR: Tensor, turns_TR2: Tensor, *, inverse: bool, backend: str) -> None:
    """Turns x, BF16 or FP32 [B, T, H, R], in place; computed in FP32, rounded once. (The reference also takes FP64.)

    ``x`` may be a part of the channels of something larger: ``q[..., 128:]`` of [B, T, H, 192] turns MLA's 64 and
    touches no others. ``turns``: FP32 [T, R / 2, 2], cosine and sine of each position and pair (``view_as_real`` of
    unit complex numbers, longer by YaRN's factor where it has one). ``inverse``: by the conjugates, which is the
    backward, and undoes unit turns.

    Raises ValueError where shapes do not fit, where channels are not contiguous, and where heads, positions or
    sequences share memory (an ``expand``: turn before it).
    """
    check_axes("rotate_", "x", x_BTHR, "B, T, H, R")
    batch, length, heads, size = x_BTHR.shape
    if size % 2 or turns_TR2.shape != (length, size // 2, 2):
        raise ValueError(f"turns {tuple(turns_TR2.shape)} do not fit {length} positions of {size} channels")
    if size > 1 and x_BTHR.stride(3) != 1:
        raise ValueError(f"channels must be contiguous, their stride is {x_BTHR.stride(3)}")
    for axis, count in enumerate((batch, length, heads)):
        if count > 1 and x_BTHR.stride(axis) < size:
            raise ValueError(
                f"axis {axis} has stride {x_BTHR.stride(axis)}, below the {size} channels: memory is shared and"
                " would be turned several times; turn before expanding"
            )
    _rotate_(x_BTHR, turns_TR2, inverse, backend=backend)
