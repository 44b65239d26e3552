"""What Triton kernels compute of a tile, bit for bit as the reference does (``formats``)."""

import triton
import triton.language as tl

from deepseek_kernels.formats import LARGEST as _LARGEST
from deepseek_kernels.formats import SMALLEST_AMAX as _SMALLEST_AMAX

LARGEST = tl.constexpr(_LARGEST)
SMALLEST_AMAX = tl.constexpr(_SMALLEST_AMAX)


@triton.jit
def scale_of(amax, POW2: tl.constexpr, MOST: tl.constexpr = LARGEST):
    """``/`` would be an approximation on the GPU. A power of two takes no division: amax / MOST exceeds a power of two
    where amax' fraction exceeds MOST's, and by enough not to be rounded to it."""
    amax = tl.maximum(amax, SMALLEST_AMAX)
    if POW2:
        bits = amax.to(tl.int32, bitcast=True)
        most = tl.full((), MOST, tl.float32).to(tl.int32, bitcast=True)
        up = (bits + 0x7FFFFF - (most & 0x7FFFFF)) & -0x800000
        scale = tl.where(bits < 0x7F800000, up - (most & -0x800000) + 0x3F800000, bits)  # Inf stays
        scale = scale.to(tl.float32, bitcast=True)
    else:
        scale = tl.math.div_rn(amax, MOST)
    return scale


@triton.jit
def inverse_of(scale, POW2: tl.constexpr = False):
    """1 / scale. That of a power of two takes no division; 0 of Inf."""
    if POW2:
        inverse = tl.maximum(0x7F000000 - scale.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    else:
        inverse = tl.math.div_rn(1.0, scale)
    return inverse
