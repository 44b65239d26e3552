"""What is quantised and multiplied in FP8: input that does not fit is refused, and the message says what does."""

from collections.abc import Callable

import pytest
import torch

from deepseek_kernels.formats import Blocks, Groups, Packed, Rows
from deepseek_kernels.gemm import gemm, gemm_add, grouped_gemm, grouped_gemm_add
from deepseek_kernels.machine import BackendUnavailable, why_not
from deepseek_kernels.quant import (
    pack_e5m6,
    quantise_blocks,
    quantise_both,
    quantise_columns,
    quantise_rows,
    requantise_columns,
)
from tests.gpu.products import blocks, rows
from tests.gpu.setting import DEVICE, randn

ON = {"backend": "triton"}
QUANTISED = {"pow2": False, "backend": "triton"}
FP32 = {"dtype": torch.float32, "backend": "triton"}

Call = Callable[[], object]


def refused(call: Call, said: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind) as error:
        call()
    assert said in str(error.value)


PRODUCTS: dict[str, tuple[Call, str]] = {
    "3d": (
        lambda: gemm(rows(8, 128), blocks(2, 64, 128), **FP32),
        "gemm: b is [2, 128, 128], must be [N, K]",
    ),
    "2d": (
        lambda: grouped_gemm(rows(128, 128), blocks(64, 128), Groups.of((128,), DEVICE), **FP32),
        "grouped_gemm: b is [128, 128], must be [E, N, K]",
    ),
    "width": (
        lambda: gemm(rows(8, 256), blocks(8, 200), **FP32),
        "gemm: both operands end in the contraction axis: a has",
    ),
    "width of rows": (
        lambda: gemm_add(rows(8, 256), rows(8, 200), randn(8, 8), **ON),
        "gemm_add: both operands end in the contraction axis: a has 256, b 200",
    ),
    "dtype": (
        lambda: gemm(rows(8, 128), blocks(8, 128), dtype=torch.float16, **ON),
        "gemm: the result's dtype is torch.float16, must be torch.bfloat16 or torch.float32",
    ),
    "accumulate": (
        lambda: gemm(
            rows(8, 128), blocks(8, 128), accumulate="promote", dtype=torch.float32, backend="reference"
        ),
        "gemm: accumulate is 'promote', must be promoted or hopper or unpromoted",
    ),
    "groups": (
        lambda: grouped_gemm(rows(128, 128), blocks(2, 64, 128), Groups.of((128, 1), DEVICE), **FP32),
        "grouped_gemm: 128 rows for 2 experts, but the groups are 2 with 256 rows",
    ),
    "columns": (
        lambda: grouped_gemm_add(
            rows(8, 128), rows(8, 128), Groups.of((128, 1), DEVICE), randn(2, 8, 8), **ON
        ),
        "grouped_gemm_add: 128 columns, but the groups have 256",
    ),
    "negative": (lambda: Groups.of((-1, 2)), "Groups.of: rows_E is (-1, 2), must not be negative"),
}

WRONG_MATRICES = [
    (lambda: randn(8), "x is [8], must be [M, K]"),
    (lambda: randn(2, 3, 8), "x is [2, 3, 8], must be [M, K]"),
    (lambda: randn(2, 8).half(), "x is torch.float16, must be torch.bfloat16 or torch.float32"),
    (lambda: randn(2, 8).double(), "x is torch.float64, must be"),
    (lambda: torch.zeros(2, 8, dtype=torch.int32, device=DEVICE), "x is torch.int32, must be"),
]


@pytest.mark.parametrize(
    ("call", "said"),
    [pytest.param(*case, id=name) for name, case in PRODUCTS.items()],
)
def test_what_does_not_fit_is_refused(call: Call, said: str) -> None:
    refused(call, said)


@pytest.mark.parametrize("quantise", [quantise_rows, quantise_columns, quantise_both, pack_e5m6])
@pytest.mark.parametrize(("x", "said"), WRONG_MATRICES)
def test_only_matrices_of_numbers_are_quantised(
    quantise: Callable[..., object], x: Callable[[], torch.Tensor], said: str
) -> None:
    how = ON if quantise is pack_e5m6 else QUANTISED
    refused(lambda: quantise(x(), **how), f"{quantise.__name__}: {said}")


def test_only_weights_are_quantised_in_blocks() -> None:
    refused(
        lambda: quantise_blocks(randn(8), **QUANTISED),
        "quantise_blocks: w is [8], must be [N, K] or [E, N, K]",
    )
    refused(lambda: quantise_blocks(randn(8, 8).half(), **QUANTISED), "quantise_blocks: w is torch.float16")


def test_operands_of_another_kind_are_named() -> None:
    a, b, groups = rows(128, 128), blocks(1, 128, 128), Groups.of((128,), DEVICE)
    refused(lambda: gemm(a, a, **FP32), "gemm: b is Rows, must be Blocks", TypeError)  # type: ignore[arg-type]
    refused(lambda: grouped_gemm(a, a, groups, **FP32), "grouped_gemm: b is Rows", TypeError)  # type: ignore[arg-type]
    refused(lambda: gemm_add(a, b, randn(128, 128), **ON), "gemm_add: b is Blocks", TypeError)  # type: ignore[arg-type]


def test_tiles_whose_scales_lie_otherwise_are_refused() -> None:
    """Such as [M, K / 128], which others have: as many numbers, other ones."""
    good, weight, packed = rows(3, 300), blocks(200, 300), pack_e5m6(randn(3, 300), **ON)
    fit = "Rows: scales is [3, 3, 1], must be [3, 3] to fit values [3, 384]"
    refused(lambda: Rows(good.values, good.scales.unsqueeze(-1), 300), fit)
    refused(
        lambda: Rows(good.values[:2], good.scales[:, :2].t(), 300), "Rows: scales is [2, 3], must be [3, 2]"
    )
    refused(lambda: Rows(good.values, good.scales, 200), "Rows: values are [3, 384], of this width")
    refused(
        lambda: Rows(randn(3, 384), good.scales, 300),
        "Rows: values is torch.float32, must be torch.float8_e4m3fn",
    )
    refused(lambda: Rows(good.values, good.scales.int(), 300), "Rows: scales is torch.int32")
    refused(
        lambda: Blocks(weight.values, weight.scales.t(), 200, 300), "Blocks: scales is [3, 2], must be [2, 3]"
    )
    refused(lambda: Blocks(weight.values, weight.scales, 300, 300), "Blocks: values are [256, 384]")
    refused(lambda: Packed(packed.words, packed.scales, 400), "Packed: values are [3, 144]")
    assert requantise_columns(good, **QUANTISED).width == 3


@pytest.mark.skipif(why_not("cuda") is None, reason="here CUDA runs")
def test_only_backends_that_run_here_are_suggested() -> None:
    with pytest.raises(BackendUnavailable) as error:
        gemm(rows(4, 128), blocks(8, 128), dtype=torch.float32, backend="cuda")
    assert str(error.value).endswith("Use reference or triton")
