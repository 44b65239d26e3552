"""Block-scaled products by cuBLAS, through ``torch.nn.functional.scaled_mm`` with its recipe spelled out (CUDA 12.9 and
Hopper alone). It has neither groups nor an accumulating form: ``gemm_add`` is a product and a sum.

What cuBLAS wants of scales (pytorch/pytorch pull request 166752): 1 x 128 as [M, K / 128] with strides (1, M), which is
how ``Rows`` has them, M a multiple of 4; 128 x 128 as [L, N / 128] with strides (1, L), L being K / 128 rounded up to a
multiple of 4. Otherwise it is wrong and says nothing.

Legend: see ``formats``; L tiles along K, padded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType, scaled_mm

from deepseek_kernels.formats import E4M3
from deepseek_kernels.machine import BackendUnavailable

_ROWS, _BLOCKS = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128


def rows_for_cublas(values_MK: Tensor, scales_GM: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Values [M', K] and scales [M', K / 128] with strides (1, M'), M' the next multiple; copies if M is none."""
    missing = -len(values_MK) % multiple
    if missing:
        values_MK = functional.pad(values_MK.view(torch.uint8), (0, 0, 0, missing)).view(E4M3)
        scales_GM = functional.pad(scales_GM, (0, missing))
    return values_MK, scales_GM.t()


def block_scales_for_cublas(scales_NG: Tensor) -> Tensor:
    """[L, N / 128] with strides (1, L); a copy unless K / 128 is a multiple of 4, as it is for all of V3's K."""
    return functional.pad(scales_NG, (0, -scales_NG.shape[1] % 4)).t()


def _refuse(a: Tensor, accumulate: str) -> None:
    if accumulate != "promoted":
        raise BackendUnavailable(
            f"accumulate={accumulate!r} is emulated by the reference alone, this is torch: use backend='reference'"
        )
    if a.device.type != "cuda":
        raise BackendUnavailable(
            "backend 'torch' is cuBLAS's block-scaled product, which a CPU does not have: use 'reference'"
        )


@contextmanager
def _multiprocessors(device: torch.device, sms: int) -> Iterator[None]:
    """cuBLAS is told how many to leave; for this thread's process, hence put back."""
    if not sms or device.type != "cuda":
        yield
        return
    there = torch.cuda.get_device_properties(device).multi_processor_count
    before = torch._C._get_sm_carveout_experimental()
    torch._C._set_sm_carveout_experimental(max(there - sms, 0))
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(before)


def product_with_blocks(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """[M', NP] in ``dtype``."""
    a, a_scales = rows_for_cublas(a, a_scales, 4)
    b_scales = block_scales_for_cublas(b_scales)
    return scaled_mm(a, b.t(), a_scales, _ROWS, b_scales, _BLOCKS, output_dtype=dtype)


def product_with_rows(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """[M', N'] in FP32."""
    a, a_scales = rows_for_cublas(a, a_scales, 4)
    b, b_scales = rows_for_cublas(b, b_scales, 16)  # columns of the product: a row of it is a multiple of 16
    return scaled_mm(a, b.t(), a_scales, _ROWS, b_scales, _ROWS, output_dtype=torch.float32)


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
    _refuse(a, accumulate)
    if not a.numel() or not rows:
        return a.new_zeros(len(a), rows, dtype=dtype)
    with _multiprocessors(a.device, sms):
        y = product_with_blocks(a, a_scales, b, b_scales, dtype)
    return y[: len(a), :rows].contiguous()


def gemm_add(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, into: Tensor, accumulate: str, sms: int
) -> None:
    _refuse(a, accumulate)
    if not a.numel() or not b.numel():
        return
    with _multiprocessors(a.device, sms):
        y = product_with_rows(a, a_scales, b, b_scales)
    into += y[: len(a), : len(b)]
