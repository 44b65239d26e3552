"""Block-scaled FP8 matrix products (V3 report section 3.3.2): what linears and experts run forward and backward.

    C[m, n] = sum over tiles g of  a.scales[g, m] * b.scales[.., g] * (sum over k in g of  a.values[m, k] *
    b.values[n, k])

A tile's sum is what the tensor cores add up; scales and sums of tiles are FP32 (promotion every 128 elements). Legend:
see ``formats``; A rows sorted by expert, in groups padded to 128.
"""

import torch
from torch import Tensor

from deepseek_kernels.formats import Blocks, Groups, Rows
from deepseek_kernels.registry import define

# How the reference adds up. "promoted": FP32 throughout, what the promotion comes to. "hopper": the tensor cores'
# 14 bits
# inside a tile, FP32 between tiles. "unpromoted": 14 bits all along K, what the promotion is there to avoid.
ACCUMULATIONS = ("promoted", "hopper", "unpromoted")


def _fake(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, rows: int, dtype: torch.dtype, accumulate: str
) -> Tensor:
    return a.new_empty(a.shape[0], rows, dtype=dtype)


def _fake_add(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, into: Tensor, accumulate: str
) -> None:
    return None


def _fake_grouped(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor,
    tile_expert: Tensor,
    rows: int,
    dtype: torch.dtype,
    accumulate: str,
) -> Tensor:
    return a.new_empty(a.shape[0], rows, dtype=dtype)


def _fake_grouped_add(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, starts: Tensor, into: Tensor, accumulate: str
) -> None:
    return None


_gemm = define(
    __name__,
    "gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, int rows, ScalarType dtype, str accumulate, *,"
    " str backend) -> Tensor",
    _fake,
    ("reference", "triton", "torch", "cuda", "ext"),
)
_gemm_add = define(
    __name__,
    "gemm_add(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor(a!) into, str accumulate, *,"
    " str backend) -> ()",
    _fake_add,
    ("reference", "triton", "torch", "cuda", "ext"),
)
_grouped_gemm = define(
    __name__,
    "grouped_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor starts, Tensor tile_expert,"
    " int rows, ScalarType dtype, str accumulate, *, str backend) -> Tensor",
    _fake_grouped,
    ("reference", "triton", "cuda", "ext"),
)
_grouped_gemm_add = define(
    __name__,
    "grouped_gemm_add(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor starts, Tensor(a!) into,"
    " str accumulate, *, str backend) -> ()",
    _fake_grouped_add,
    ("reference", "triton", "cuda", "ext"),
)


def gemm(a: Rows, b: Blocks, *, dtype: torch.dtype, backend: str, accumulate: str = "promoted") -> Tensor:
    """a b^T: [M, b.rows] in ``dtype`` (BF16 or FP32). A linear's forward (b = W), or its input gradient (b = W^T).
    ``accumulate``: other than "promoted" with the reference alone."""
    return _gemm(a.values, a.scales, b.values, b.scales, b.rows, dtype, accumulate, backend=backend)


def gemm_add(a: Rows, b: Rows, into: Tensor, *, backend: str, accumulate: str = "promoted") -> None:
    """into += a b^T, FP32 [M, N]: a weight gradient from dy^T [out, tokens] and x^T [in, tokens]."""
    _gemm_add(a.values, a.scales, b.values, b.scales, into, accumulate, backend=backend)


def grouped_gemm(
    a: Rows, b: Blocks, groups: Groups, *, dtype: torch.dtype, backend: str, accumulate: str = "promoted"
) -> Tensor:
    """For each expert e its padded rows of ``a`` times b[e]^T: [A, b.rows]. Padding rows give zeros."""
    return _grouped_gemm(
        a.values,
        a.scales,
        b.values,
        b.scales,
        groups.starts,
        groups.tile_expert,
        b.rows,
        dtype,
        accumulate,
        backend=backend,
    )


def grouped_gemm_add(
    a: Rows, b: Rows, groups: Groups, into: Tensor, *, backend: str, accumulate: str = "promoted"
) -> None:
    """into[e] += a_e b_e^T, FP32 [E, N, K], where a_e and b_e are the columns of expert e: dy^T [N, A] and x^T [K,
    A], rows
    sorted and padded as in ``groups``. An expert without rows keeps what it has."""
    _grouped_gemm_add(
        a.values, a.scales, b.values, b.scales, groups.starts, into, accumulate, backend=backend
    )
