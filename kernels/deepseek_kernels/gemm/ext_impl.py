"""Block-scaled products by DeepGEMM, where ``deep_gemm`` is installed. This adapter has never run: it is written after
DeepGEMM's public interface on Hopper (scales FP32, recipe (1, 128, 128) for weights, (1, 1, 128) for weight gradients),
which differs between its versions. The grouped weight gradient copies its operands expert by expert, as DeepGEMM wants
them, and waits for the host to know where experts begin. Legend: see ``formats``.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from deepseek_kernels.formats import TILE
from deepseek_kernels.machine import BackendUnavailable

_WEIGHT, _GRADIENT = (1, TILE, TILE), (1, 1, TILE)


@cache
def _deep_gemm() -> ModuleType:
    try:
        return importlib.import_module("deep_gemm")
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"backend 'ext' of these products is DeepGEMM, which cannot be imported ({error}): install it from its "
            "repository (what PyPI has lacks its headers), or use 'cuda' or 'triton'"
        ) from error


@contextmanager
def _ready(accumulate: str, sms: int) -> Iterator[ModuleType]:
    if accumulate != "promoted":
        raise BackendUnavailable(
            f"accumulate={accumulate!r} is emulated by the reference alone, this is ext: use backend='reference'"
        )
    library = _deep_gemm()
    before = library.get_num_sms()
    library.set_num_sms(sms or before)
    try:
        yield library
    finally:
        library.set_num_sms(before)


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
    with _ready(accumulate, sms) as library:
        y = a.new_empty(len(a), len(b), dtype=dtype)
        library.fp8_gemm_nt((a, a_scales.t()), (b, b_scales), y, recipe=_WEIGHT, disable_ue8m0_cast=True)
    return y[:, :rows].contiguous()


def gemm_add(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, into: Tensor, accumulate: str, sms: int
) -> None:
    with _ready(accumulate, sms) as library:
        library.fp8_gemm_nt(
            (a, a_scales.t()),
            (b, b_scales.t()),
            into,
            c=into,
            recipe=_GRADIENT,
            disable_ue8m0_cast=True,
        )


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
    with _ready(accumulate, sms) as library:
        if dtype is not torch.bfloat16:
            raise BackendUnavailable(
                f"DeepGEMM's grouped product gives BF16, not {dtype}: use 'cuda' or 'triton'"
            )
        y = a.new_empty(len(a), b.shape[1], dtype=dtype)
        owners = tile_expert.repeat_interleave(TILE)
        library.m_grouped_fp8_gemm_nt_contiguous(
            (a, a_scales.t()), (b, b_scales), y, owners, recipe=_WEIGHT, disable_ue8m0_cast=True
        )
    return y[:, :rows].contiguous()


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
    with _ready(accumulate, sms) as library:
        sizes = starts.diff()
        counts = sizes.tolist()
        library.k_grouped_fp8_gemm_nt_contiguous(
            (_expert_by_expert(a, counts), a_scales),
            (_expert_by_expert(b, counts), b_scales),
            into,
            counts,
            sizes,
            into,
        )


def _expert_by_expert(values_NA: Tensor, counts: list[int]) -> Tensor:
    """Each expert's [N, its columns] contiguous, one after the other."""
    return torch.cat([part.flatten() for part in values_NA.split(counts, 1)])
