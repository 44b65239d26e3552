"""Block-scaled products by Triton: what is launched, and how. Legend: see ``formats``."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_kernels.formats import TILE
from deepseek_kernels.gemm.triton_forward import forward_kernel
from deepseek_kernels.gemm.triton_gradient import gradient_kernel
from deepseek_kernels.machine import BackendUnavailable

WARPS = 8  # two warpgroups, 64 rows of a tile each
BAND = 16  # tiles of rows; with the columns that run at the same time about a square


@dataclass(frozen=True)
class Forward:
    """A form of ``forward_kernel``. Stages are those that fit in shared memory beside a tile of the output."""

    name: str
    wide: bool
    stages_bf16: int
    stages_fp32: int

    @property
    def columns(self) -> int:
        return 192 if self.wide else TILE

    def launch(self, dtype: torch.dtype) -> dict[str, int]:
        stages = self.stages_fp32 if dtype is torch.float32 else self.stages_bf16
        return {"num_warps": WARPS, "num_stages": stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Gradient:
    """A form of ``gradient_kernel``."""

    name: str
    halves: bool
    stages: int

    @property
    def rows(self) -> int:
        return TILE // 2 if self.halves else TILE

    def launch(self) -> dict[str, int]:
        return {"num_warps": WARPS, "num_stages": self.stages, "enable_fp_fusion": True}


# The first of each is what the ops use; a benchmark may race them all.
FORWARDS = (Forward("wide", True, 4, 3), Forward("square", False, 4, 4), Forward("square deep", False, 6, 5))
GRADIENTS = (Gradient("halves", True, 4), Gradient("halves deep", True, 6), Gradient("square", False, 5))


def _programs(x: Tensor, tiles: int, sms: int) -> tuple[int]:
    """As many as run at once: one fills a multiprocessor. Few in the interpreter, each then with several tiles."""
    if not sms:
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    return (min(tiles, sms),)


def _only_promoted(accumulate: str) -> None:
    if accumulate != "promoted":
        raise BackendUnavailable(
            f"accumulate={accumulate!r} is emulated by the reference alone, this is triton: use backend='reference'"
        )


def _product(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    tile_expert: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    accumulate: str,
    sms: int,
    form: Forward,
) -> Tensor:
    _only_promoted(accumulate)
    if not a.numel() or not rows:
        return a.new_zeros(len(a), rows, dtype=dtype)
    m, k = a.shape
    pitch = -(-rows // 16) * 16  # the copy engine wants rows that begin at multiples of 16 bytes
    y = a.new_empty(m, pitch, dtype=dtype)
    shape, strides = [m, rows], [pitch, 1]
    flat_b = b.view(-1, k)
    tiles_m, tiles_n = triton.cdiv(m, TILE), triton.cdiv(rows, form.columns)
    forward_kernel[_programs(a, tiles_m * tiles_n, sms)](
        TensorDescriptor.from_tensor(a, [TILE, TILE]),
        TensorDescriptor.from_tensor(flat_b, [TILE, TILE]),
        TensorDescriptor.from_tensor(flat_b, [TILE // 2, TILE]),
        TensorDescriptor(y, shape, strides, [TILE, TILE]),
        TensorDescriptor(y, shape, strides, [TILE, TILE // 2]),
        a_scales,
        b_scales,
        tile_expert,
        m,
        b.shape[-2],
        k // TILE,
        tiles_m,
        tiles_n,
        form.wide,
        BAND,
        **form.launch(dtype),
    )
    return y[:, :rows].contiguous()


def _add_product(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor | None,
    into: Tensor,
    accumulate: str,
    sms: int,
    form: Gradient,
) -> None:
    _only_promoted(accumulate)
    if not a.numel() or not b.numel():
        return
    n = len(b)
    if n % 16:  # rows of the sum that begin at multiples of 16 elements keep accesses whole
        wide = into.new_zeros(*into.shape[:-1], -(-n // 16) * 16)
        _launch_gradient(a, a_scales, b, b_scales, starts, wide, sms, form)
        into += wide[..., :n]
    else:
        _launch_gradient(a, a_scales, b, b_scales, starts, into, sms, form)


def _launch_gradient(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor | None,
    into: Tensor,
    sms: int,
    form: Gradient,
) -> None:
    (m, k), n = a.shape, len(b)
    experts = 1 if starts is None else len(into)
    tiles_m, tiles_n = triton.cdiv(m, TILE), triton.cdiv(n, TILE)
    gradient_kernel[_programs(a, experts * tiles_m * tiles_n, sms)](
        TensorDescriptor.from_tensor(a, [form.rows, TILE]),
        TensorDescriptor.from_tensor(b, [TILE, TILE]),
        a_scales,
        b_scales,
        into,
        starts,
        m,
        n,
        into.shape[-1],
        k // TILE,
        experts,
        tiles_m,
        tiles_n,
        form.halves,
        BAND,
        **form.launch(),
    )


def gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    rows: int,
    dtype: torch.dtype,
    accumulate: str,
    sms: int,
    form: Forward = FORWARDS[0],
) -> Tensor:
    return _product(a, a_scales, b, b_scales, None, rows, dtype, accumulate, sms, form)


def gemm_add(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    into: Tensor,
    accumulate: str,
    sms: int,
    form: Gradient = GRADIENTS[0],
) -> None:
    _add_product(a, a_scales, b, b_scales, None, into, accumulate, sms, form)


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
    form: Forward = FORWARDS[0],
) -> Tensor:
    return _product(a, a_scales, b, b_scales, tile_expert, rows, dtype, accumulate, sms, form)


def grouped_gemm_add(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor,
    into: Tensor,
    accumulate: str,
    sms: int,
    form: Gradient = GRADIENTS[0],
) -> None:
    _add_product(a, a_scales, b, b_scales, starts, into, accumulate, sms, form)
