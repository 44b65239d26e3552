"""Block-scaled products by ``csrc/block_scaled_gemm.cu``: wgmma, TMA and clusters of two, for Hopper. Legend: see
``formats``."""

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.cuda_library import cuda_function
from deepseek_kernels.machine import BackendUnavailable

_BF16, _FP32, _ADD = 0, 1, 2


def _run(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    into: Tensor,
    *,
    tile_expert: Tensor | None = None,
    starts: Tensor | None = None,
    output: int,
    sms: int,
    accumulate: str,
) -> None:
    if accumulate != "promoted":
        raise BackendUnavailable(
            f"accumulate={accumulate!r} is emulated by the reference alone, this is cuda"
        )
    m, n, k = into.shape[-2], into.shape[-1], a.shape[1]
    if not (m and n):
        return
    if not k:  # nothing to add up
        if output != _ADD:
            into.zero_()
        return
    experts = len(b) if b.ndim == 3 else 1 if starts is None else len(starts) - 1
    # Named, for they must outlive the call.
    a_scales, b_scales = _aligned(a_scales), _aligned(b_scales) if output == _ADD else b_scales
    # At least one cluster of two.
    blocks = max(sms, 2) if sms else torch.cuda.get_device_properties(a.device).multi_processor_count
    code = cuda_function("block_scaled_gemm", "deepseek_block_scaled_gemm")(
        a.data_ptr(),
        a_scales.data_ptr(),
        b.data_ptr(),
        b_scales.data_ptr(),
        into.data_ptr(),
        tile_expert.data_ptr() if tile_expert is not None else None,
        starts.data_ptr() if starts is not None else None,
        m,
        n,
        k,
        b.shape[-2],
        experts,
        output,
        blocks,
        torch.cuda.current_stream(a.device).cuda_stream,
    )
    if code:
        raise RuntimeError(
            f"block_scaled_gemm [{m}, {n}, {k}] was not started: error {code} (positive: CUDA's own; -1: libcuda.so.1 "
            "was not found; -2: an operand cannot be described to the copy engine)"
        )


def _aligned(scales_GM: Tensor) -> Tensor:
    """The copy engine reads rows that begin at multiples of 16 bytes."""
    return functional.pad(scales_GM, (0, -scales_GM.shape[1] % 4)) if scales_GM.shape[1] % 4 else scales_GM


def gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    rows: int,
    dtype: torch.dtype,
    accumulate: str,
    sms: int,
) -> Tensor:
    y = a.new_empty(len(a), rows, dtype=dtype)
    output = _BF16 if dtype is torch.bfloat16 else _FP32
    _run(a, a_scales, b, b_scales, y, output=output, sms=sms, accumulate=accumulate)
    return y


def gemm_add(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, into: Tensor, accumulate: str, sms: int
) -> None:
    _run(a, a_scales, b, b_scales, into, output=_ADD, sms=sms, accumulate=accumulate)


def grouped_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor,
    tile_expert: Tensor,
    rows: int,
    dtype: torch.dtype,
    accumulate: str,
    sms: int,
) -> Tensor:
    y = a.new_empty(len(a), rows, dtype=dtype)
    output = _BF16 if dtype is torch.bfloat16 else _FP32
    _run(
        a,
        a_scales,
        b,
        b_scales,
        y,
        tile_expert=tile_expert,
        output=output,
        sms=sms,
        accumulate=accumulate,
    )
    return y


def grouped_gemm_add(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor,
    into: Tensor,
    accumulate: str,
    sms: int,
) -> None:
    _run(
        a,
        a_scales,
        b,
        b_scales,
        into,
        starts=starts,
        output=_ADD,
        sms=sms,
        accumulate=accumulate,
    )
