"""FP8 as DeepSeek-V3 publishes it: E4M3 [N, K], and for every block of 128 x 128 an FP32 scale by which its values are
multiplied (``weight_scale_inv`` [N / 128, K / 128], rounded up).

Taken apart and made again, a tensor of ours is the same to the last bit (tests/cpu/test_hf_fp8.py). The largest value
of a block becomes 448 exactly. Its product with the scale s is fl(448 s), and fl(fl(448 s) / 448) = s although neither
step is exact: 448 is 7 powers of two, s came from a division by 7, and such quotients miss just those numbers for which
rounding 7 s would lead elsewhere. All others come back within two roundings of FP32, far less than half a step of E4M3.
"""

from torch import Tensor
from torch.nn import functional

from deepseek_kernels.formats import TILE
from deepseek_kernels.quant.reference import from_e4m3, quantise_blocks

SCALE = "_scale_inv"  # what the scales are called, after their tensor's name


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a matrix."""
    return tuple(-(-size // TILE) for size in shape)


def quantise(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 or BF16 -> E4M3 [N, K], FP32 scales."""
    rows, width = w_NK.shape
    values, scales = quantise_blocks(w_NK, pow2=False)
    return values[:rows, :width].contiguous(), scales


def dequantise(values_NK: Tensor, scales: Tensor) -> Tensor:
    """FP32: each value times its block's scale, rounded once."""
    rows, width = values_NK.shape
    values = functional.pad(from_e4m3(values_NK), (0, -width % TILE, 0, -rows % TILE))
    blocks = values.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    scaled = blocks * scales.unsqueeze(-1).unsqueeze(1)
    return scaled.flatten(0, 1).flatten(1)[:rows, :width].contiguous()
