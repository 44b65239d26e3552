"""What Triton kernels compute of a tile, bit for bit as the reference does (``formats``)."""

import triton
import triton.language as tl

from deepseek_kernels.formats import LARGEST as _LARGEST
from deepseek_kernels.formats import SMALLEST_AMAX as _SMALLEST_AMAX

LARGEST = tl.constexpr(_LARGEST)
SMALLEST_AMAX = tl.constexpr(_SMALLEST_AMAX)


@triton.jit
def scale_of(amax, POW2: tl.constexpr):
    """``/`` would be an approximation on the GPU."""
    scale = tl.math.div_rn(tl.maximum(amax, SMALLEST_AMAX), LARGEST)
    if POW2:
        up = scale.to(tl.int32, bitcast=True) + 0x7FFFFF
        scale = (up & -0x800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def inverse_of(scale):
    return tl.math.div_rn(1.0, scale)
