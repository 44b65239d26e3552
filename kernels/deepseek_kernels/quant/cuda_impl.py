"""Quantisation by ``csrc/quantise_tiles.cu`` and ``csrc/pack_e5m6.cu``, for Hopper: where these are the faster ones on
an H200 (on an H100 Triton's quantise_both is, by up to 5%, and its requantise_columns on large ones).

They take whole tiles of 128 channels in BF16 (or FP8) whose rows begin at multiples of 16 bytes. Anything else, and the
other ops, are Triton's kernels: equal to the bit.
Legend: see ``formats``.
"""

import torch
from torch import Tensor

from deepseek_kernels.cuda_library import cuda_function
from deepseek_kernels.formats import E4M3, TILE, new_tiles
from deepseek_kernels.quant import triton_impl
from deepseek_kernels.quant.triton_impl import (  # noqa: F401
    dequantise,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    transpose_values,
    unpack_e5m6,
)

PLAIN, KEPT, SWIGLU, SWIGLU_KEPT, GRADIENTS, GRADIENTS_KEPT = range(6)


def whole(x_MK: Tensor, width: int) -> bool:
    """Whether the kernels can take this matrix as it lies."""
    return bool(
        x_MK.dtype in (torch.bfloat16, E4M3)
        and x_MK.numel()
        and width % TILE == 0
        and x_MK.stride(1) == 1
        and x_MK.stride(0) * x_MK.element_size() % 16 == 0
        and x_MK.data_ptr() % 16 == 0
    )


def run_tiles(
    source: int,
    x: Tensor,
    f: int,
    pow2: bool,
    *,
    into_t: tuple[Tensor, Tensor],
    into: tuple[Tensor, Tensor] | None = None,
    x_scales: Tensor | None = None,
    dy: Tensor | None = None,
    weight: Tensor | None = None,
    parts: Tensor | None = None,
) -> None:
    """Fills ``into_t`` and ``into``, values and scales of tiles of 128 x 1 and 1 x 128. ``f``: channels of a half of
    ``x`` (of all of it, where it is no pair)."""
    values, scales = into or (None, None)
    tensors = (x, dy, x_scales, weight, values, scales, *into_t, parts)
    _checked(
        "quantise_tiles",
        cuda_function("quantise_tiles", "deepseek_quantise_tiles")(
            *(None if one is None else one.data_ptr() for one in tensors),
            x.stride(0) * x.element_size(),
            len(x),
            f,
            source,
            int(pow2),
            torch.cuda.get_device_properties(x.device).multi_processor_count,
            torch.cuda.current_stream(x.device).cuda_stream,
        ),
    )


def _checked(name: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{name} was not started: CUDA's error {code}")


def quantise_both(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = x_MK.shape
    if x_MK.dtype is not torch.bfloat16 or not whole(x_MK, k):
        return triton_impl.quantise_both(x_MK, pow2)
    rows, turned = new_tiles(x_MK, m, k), new_tiles(x_MK, k, m)
    run_tiles(PLAIN, x_MK, k, pow2, into_t=turned, into=rows)
    return *rows, *turned


def requantise_columns(values: Tensor, scales: Tensor, width: int, pow2: bool) -> tuple[Tensor, Tensor]:
    if not whole(values, width):
        return triton_impl.requantise_columns(values, scales, width, pow2)
    turned, scales = new_tiles(values, width, len(values)), scales.contiguous()
    run_tiles(KEPT, values, width, pow2, into_t=turned, x_scales=scales)
    return turned


def pack_e5m6(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x_MK.shape
    if not whole(x_MK, k) or x_MK.dtype is not torch.bfloat16:
        return triton_impl.pack_e5m6(x_MK)
    words = x_MK.new_empty(m, k // 8 * 3, dtype=torch.int32)
    scales = x_MK.new_empty(k // TILE, m, dtype=torch.float32)
    _checked(
        "pack_e5m6",
        cuda_function("pack_e5m6", "deepseek_pack_e5m6")(
            x_MK.data_ptr(),
            words.data_ptr(),
            scales.data_ptr(),
            x_MK.stride(0) * 2,
            m,
            k // TILE,
            torch.cuda.current_stream(x_MK.device).cuda_stream,
        ),
    )
    return words, scales
