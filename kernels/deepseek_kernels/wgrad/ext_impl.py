"""Weight gradients by NVIDIA's apex, built from source with its CUDA extensions (PyPI's ``apex`` is another project):
the
sum is the product's own accumulator, one kernel. Guarded by its symbol; never run on a machine of ours."""

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from deepseek_kernels.machine import BackendUnavailable


@cache
def _accumulate() -> Callable[[Tensor, Tensor, Tensor], None]:
    try:
        return importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"weight_gradient: backend 'ext' is apex's wgrad_gemm_accum_fp32, which cannot be had ({error}): build "
            "apex from NVIDIA's repository with its CUDA extensions, or use 'torch'"
        ) from error


def weight_gradient(dy: Tensor, x: Tensor, into: Tensor) -> None:
    if into.dtype is not torch.float32 or x.dtype is not torch.bfloat16:
        raise BackendUnavailable(
            f"weight_gradient: apex adds BF16 operands to FP32, these are {x.dtype} and {into.dtype}: use 'reference'"
        )
    _accumulate()(x.contiguous(), dy.contiguous(), into)
