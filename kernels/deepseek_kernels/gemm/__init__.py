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
from deepseek_kernels.shapes import NUMBERS, check_axes, check_dtype

# How the reference adds up. "promoted": FP32 throughout, what the promotion comes to. "hopper": the tensor cores'
# 14 bits
# inside a tile, FP32 between tiles. "unpromoted": 14 bits all along K, what the promotion is there to avoid.
ACCUMULATIONS = ("promoted", "hopper", "unpromoted")


def _fake(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    rows: int,
    dtype: torch.dtype,
    accumulate: str,
    sms: int,
) -> Tensor:
    return a.new_empty(a.shape[0], rows, dtype=dtype)


def _fake_add(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, into: Tensor, accumulate: str, sms: int
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
    sms: int,
) -> Tensor:
    return a.new_empty(a.shape[0], rows, dtype=dtype)


def _fake_grouped_add(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    starts: Tensor,
    into: Tensor,
    accumulate: str,
    sms: int,
) -> None:
    return None


_gemm = define(
    __name__,
    "gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, int rows, ScalarType dtype, str accumulate, int sms, *,"
    " str backend) -> Tensor",
    _fake,
    ("reference", "triton", "torch", "cuda", "ext"),
)
_gemm_add = define(
    __name__,
    "gemm_add(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor(a!) into, str accumulate, int sms, *,"
    " str backend) -> ()",
    _fake_add,
    ("reference", "triton", "torch", "cuda", "ext"),
)
_grouped_gemm = define(
    __name__,
    "grouped_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor starts, Tensor tile_expert,"
    " int rows, ScalarType dtype, str accumulate, int sms, *, str backend) -> Tensor",
    _fake_grouped,
    ("reference", "triton", "cuda", "ext"),
)
_grouped_gemm_add = define(
    __name__,
    "grouped_gemm_add(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor starts, Tensor(a!) into,"
    " str accumulate, int sms, *, str backend) -> ()",
    _fake_grouped_add,
    ("reference", "triton", "cuda", "ext"),
)


def gemm(
    a: Rows, b: Blocks, *, dtype: torch.dtype, backend: str, accumulate: str = "promoted", sms: int = 0
) -> Tensor:
    """a b^T: [M, b.rows] in ``dtype`` (BF16 or FP32). A linear's forward (b = W), or its input gradient (b = W^T).
    ``accumulate``: other than "promoted" with the reference alone. ``sms``: how many multiprocessors to take, leaving
    the others to communication; 0: all. Few rows or columns cost as much as 128 of them."""
    _check_result("gemm", b, "N, K", dtype)
    _check_contraction("gemm", a, b, accumulate)
    return _gemm(a.values, a.scales, b.values, b.scales, b.rows, dtype, accumulate, sms, backend=backend)


def gemm_add(
    a: Rows, b: Rows, into: Tensor, *, backend: str, accumulate: str = "promoted", sms: int = 0
) -> None:
    """into += a b^T, FP32 [M, N]: a weight gradient from dy^T [out, tokens] and x^T [in, tokens]. The product is summed
    first and added once."""
    _check_rows("gemm_add", b)
    _check_contraction("gemm_add", a, b, accumulate)
    _check_sum("gemm_add", into, (len(a.values), len(b.values)))
    _gemm_add(a.values, a.scales, b.values, b.scales, into, accumulate, sms, backend=backend)


def grouped_gemm(
    a: Rows,
    b: Blocks,
    groups: Groups,
    *,
    dtype: torch.dtype,
    backend: str,
    accumulate: str = "promoted",
    sms: int = 0,
) -> Tensor:
    """For each expert e its padded rows of ``a`` times b[e]^T: [A, b.rows]. Padding rows give zeros."""
    _check_result("grouped_gemm", b, "E, N, K", dtype)
    _check_contraction("grouped_gemm", a, b, accumulate)
    if len(a.values) != groups.padded or len(b.values) != len(groups.rows_E):
        raise ValueError(
            f"grouped_gemm: {len(a.values)} rows for {len(b.values)} experts, but the groups are "
            f"{len(groups.rows_E)} with {groups.padded} rows, padding counted"
        )
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
        sms,
        backend=backend,
    )


def grouped_gemm_add(
    a: Rows,
    b: Rows,
    groups: Groups,
    into: Tensor,
    *,
    backend: str,
    accumulate: str = "promoted",
    sms: int = 0,
) -> None:
    """into[e] += a_e b_e^T, FP32 [E, N, K], where a_e and b_e are the columns of expert e: dy^T [N, A] and x^T [K, A],
    rows sorted and padded as in ``groups``. An expert without rows keeps what it has."""
    _check_rows("grouped_gemm_add", b)
    _check_contraction("grouped_gemm_add", a, b, accumulate)
    _check_sum("grouped_gemm_add", into, (len(groups.rows_E), len(a.values), len(b.values)))
    if a.values.shape[1] != groups.padded:
        raise ValueError(
            f"grouped_gemm_add: {a.values.shape[1]} columns, but the groups have {groups.padded}, padding counted"
        )
    _grouped_gemm_add(
        a.values, a.scales, b.values, b.scales, groups.starts, into, accumulate, sms, backend=backend
    )


def _check_result(function: str, b: Blocks, legend: str, dtype: torch.dtype) -> None:
    if not isinstance(b, Blocks):
        raise TypeError(
            f"{function}: b is {type(b).__name__}, must be Blocks; {function}_add takes Rows twice"
        )
    check_axes(function, "b", b.values, legend)
    check_dtype(function, "the result's dtype", dtype, *NUMBERS)


def _check_contraction(function: str, a: Rows, b: Rows | Blocks, accumulate: str) -> None:
    if a.width != b.width:
        raise ValueError(
            f"{function}: both operands end in the contraction axis: a has {a.width}, b {b.width} (a weight gradient "
            "takes both transposed: dy^T and x^T)"
        )
    if accumulate not in ACCUMULATIONS:
        raise ValueError(f"{function}: accumulate is {accumulate!r}, must be {' or '.join(ACCUMULATIONS)}")
    for name, one in (("a", a), ("b", b)):
        if not (one.values.is_contiguous() and one.scales.is_contiguous()):
            raise ValueError(
                f"{function}: values and scales of {name} are addressed as they lie: make them contiguous"
            )


def _check_rows(function: str, b: Rows) -> None:
    if not isinstance(b, Rows):
        raise TypeError(f"{function}: b is {type(b).__name__}, must be Rows")


def _check_sum(function: str, into: Tensor, shape: tuple[int, ...]) -> None:
    if into.shape != shape or into.dtype != torch.float32 or not into.is_contiguous():
        raise ValueError(
            f"{function}: the product is added into contiguous FP32 {list(shape)}, not {into.dtype} {list(into.shape)}"
        )
