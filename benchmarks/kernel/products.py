"""Contests of matrix products at the shapes of DeepSeek-V3 (V3_SPEC A.3, D.4): FP8 with scales of tiles against BF16.

Legend: M tokens, N outputs, K inputs; 4 x 8192 rows of 4 experts.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel.contest import Contest, there
from deepseek_kernels import gemm, quant
from deepseek_kernels.formats import Blocks, Groups, Rows

DENSE = (
    (4096, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 7168, 2048),
    (4096, 24576, 1536),
    (4096, 32768, 512),
    (4096, 2112, 7168),
    (4096, 1536, 7168),
    (4096, 36864, 7168),
    (4096, 7168, 18432),
)
WEIGHT_GRADIENTS = ((7168, 16384, 4096), (4096, 7168, 4096), (24576, 1536, 4096))
GROUPED = ((4096, 7168), (7168, 2048))


def contests(device: torch.device, shrink: int) -> Iterator[Contest]:
    """``shrink`` divides all sizes, to rehearse."""
    for m, n, k in DENSE[:1] if shrink > 1 else DENSE:
        yield _dense(device, m // shrink, n // shrink, k // shrink)
    for n, k, tokens in WEIGHT_GRADIENTS[:1] if shrink > 1 else WEIGHT_GRADIENTS:
        yield _weight_gradient(device, n // shrink, k // shrink, tokens // shrink)
    for n, k in GROUPED[:1] if shrink > 1 else GROUPED:
        yield from _grouped(device, 8192 // shrink, n // shrink, k // shrink)


def rows(device: torch.device, m: int, k: int) -> Rows:
    return quant.quantise_rows(_bf16(device, m, k), pow2=False, backend="triton")


def blocks(device: torch.device, *shape: int) -> Blocks:
    return quant.quantise_blocks(_bf16(device, *shape), pow2=False, backend="triton")


def _bf16(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def _dense(device: torch.device, m: int, n: int, k: int) -> Contest:
    a, b = rows(device, m, k), blocks(device, n, k)
    x, w = _bf16(device, m, k), _bf16(device, n, k)
    entries = {
        name: partial(gemm.gemm, a, b, dtype=torch.bfloat16, backend=name)
        for name in there("cuda", "torch", "triton")
        if device.type == "cuda" or name == "triton"
    }
    entries["(cuBLAS BF16)"] = partial(functional.linear, x, w)
    return Contest("gemm", f"{m} x {n} x {k}", "fp8", 2 * m * n * k, entries)


def _weight_gradient(device: torch.device, n: int, k: int, tokens: int) -> Contest:
    dy, x = _bf16(device, tokens, n), _bf16(device, tokens, k)
    a, b = (quant.quantise_columns(t, pow2=False, backend="triton") for t in (dy, x))
    into = torch.zeros(n, k, device=device)
    entries = {
        name: partial(gemm.gemm_add, a, b, into, backend=name)
        for name in there("cuda", "torch", "triton")
        if device.type == "cuda" or name == "triton"
    }

    def bf16() -> None:
        if device.type == "cuda":
            into.add_(torch.mm(dy.t(), x, out_dtype=torch.float32))
        else:
            into.add_(torch.mm(dy.t(), x))

    entries["(cuBLAS BF16, FP32 sum)"] = bf16
    return Contest("gemm_add (dW)", f"{n} x {k} x {tokens}", "fp8", 2 * n * k * tokens, entries)


def _grouped(device: torch.device, each: int, n: int, k: int) -> Iterator[Contest]:
    groups = Groups.of((each,) * 4, device)
    a, b = rows(device, groups.padded, k), blocks(device, 4, n, k)
    x, w = _bf16(device, groups.padded, k), _bf16(device, 4, n, k)
    ends, flops = groups.starts[1:], 2 * groups.padded * n * k
    names = [n for n in there("cuda", "triton") if device.type == "cuda" or n == "triton"]
    entries = {
        name: partial(gemm.grouped_gemm, a, b, groups, dtype=torch.bfloat16, backend=name) for name in names
    }
    entries["(torch grouped_mm BF16)"] = lambda: torch._grouped_mm(x, w.mT, offs=ends)
    yield Contest("grouped_gemm", f"4 x {each} x {n} x {k}", "fp8", flops, entries)
    dy = _bf16(device, groups.padded, n)
    columns = [quant.quantise_columns(t, pow2=False, backend="triton") for t in (dy, x)]
    into = torch.zeros(4, n, k, device=device)
    entries = {
        name: partial(gemm.grouped_gemm_add, columns[0], columns[1], groups, into, backend=name)
        for name in names
    }
    entries["(torch grouped_mm BF16, FP32 sum)"] = lambda: into.add_(torch._grouped_mm(dy.t(), x, offs=ends))
    yield Contest("grouped_gemm_add (dW)", f"4 x {each} x {n} x {k}", "fp8", flops, entries)
