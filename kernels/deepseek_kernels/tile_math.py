"""What Triton kernels compute of a tile, bit for bit as the reference does (``formats``)."""

import triton
import triton.language as tl

from deepseek_kernels.formats import LARGEST as _LARGEST
from deepseek_kernels.formats import SMALLEST_AMAX as _SMALLEST_AMAX

LARGEST = tl.constexpr(_LARGEST)
SMALLEST_AMAX = tl.constexpr(_SMALLEST_AMAX)


@triton.jit
def scale_of(amax, POW2: tl.constexpr, MOST: tl.constexpr = LARGEST):
    """``/`` would be an approximation on the GPU."""
    scale = tl.math.div_rn(tl.maximum(amax, SMALLEST_AMAX), MOST)
    if POW2:
        up = scale.to(tl.int32, bitcast=True) + 0x7FFFFF
        scale = (up & -0x800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def inverse_of(scale):
    return tl.math.div_rn(1.0, scale)


@triton.jit
def four_in_a_word(a, b, c, d):
    """Four tiles of one-byte values as one of 32-bit words, ``a`` lowest. Transposing words costs a quarter of what
    transposing bytes does, so transposing kernels hold four neighbouring rows in four tiles."""
    ab = _byte(a) | (_byte(b) << 8)
    return ab | (_byte(c) << 16) | (_byte(d) << 24)


@triton.jit
def _byte(x):
    return x.to(tl.uint8, bitcast=True).to(tl.int32)
