"""What is behind single backends of the block-scaled products: every form of the Triton kernels that a benchmark may
race, and the layouts that cuBLAS is given."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, scaled_mm

from deepseek_kernels.formats import E4M3, Groups
from deepseek_kernels.gemm import torch_impl, triton_impl
from deepseek_kernels.machine import BackendUnavailable
from tests.gpu.products import Exact, added, blocks, grouped_columns, grouped_rows, plain, rows
from tests.gpu.setting import DEVICE, ON_GPU, randn, same_bits, size


@pytest.mark.parametrize("form", triton_impl.FORWARDS, ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_forms(form: triton_impl.Forward, dtype: torch.dtype) -> None:
    groups = Groups.of((130, 0, 1), DEVICE)
    k, n = size(2048, 384), size(7168, 333)
    a, b = grouped_rows(k, groups), blocks(3, n, k)
    y = triton_impl.grouped_gemm(
        a.values,
        a.scales,
        b.values,
        b.scales,
        groups.starts,
        groups.tile_expert,
        n,
        dtype,
        "promoted",
        0,
        form,
    )
    x, w = plain(a), plain(b)
    assert Exact.of(x[:256], w[0]).off(y[:256], "triton") <= 1
    assert Exact.of(x[256:], w[2]).off(y[256:], "triton") <= 1


@pytest.mark.parametrize("form", triton_impl.GRADIENTS, ids=lambda form: form.name)
def test_gradient_forms(form: triton_impl.Gradient) -> None:
    groups = Groups.of((130, 0, 100), DEVICE)
    m, n = size(2048, 200), size(7168, 144)
    a, b, into = grouped_columns(m, groups), grouped_columns(n, groups), randn(3, m, n)
    before = into.clone()
    triton_impl.grouped_gemm_add(
        a.values, a.scales, b.values, b.scales, groups.starts, into, "promoted", 0, form
    )
    x, y = plain(a), plain(b)
    for e, at in ((0, slice(0, 256)), (2, slice(256, 384))):
        assert added(Exact.of(x[:, at], y[:, at]), before[e]).off(into[e], "triton") <= 1
    assert same_bits(into[1], before[1])


@pytest.mark.parametrize(("m", "multiple"), [(1, 4), (8, 4), (30, 16)])
def test_rows_are_padded_for_cublas(m: int, multiple: int) -> None:
    a = rows(m, 640)
    values, scales = torch_impl.rows_for_cublas(a.values, a.scales, multiple)
    padded = -(-m // multiple) * multiple
    assert values.shape == (padded, 640)
    assert scales.shape == (padded, 5)
    assert scales.stride() == (1, padded)
    assert same_bits(values[:m].float(), a.values.float())
    assert same_bits(scales[:m], a.scales.t())
    assert not values[m:].float().any()
    assert not scales[m:].any()


@pytest.mark.parametrize("k", [128, 512, 640])
def test_block_scales_are_padded_for_cublas(k: int) -> None:
    b = blocks(300, k)
    scales = torch_impl.block_scales_for_cublas(b.scales)
    tiles, long = k // 128, -(-k // 512) * 4
    assert scales.shape == (long, 3)
    assert scales.stride() == (1, long)
    assert same_bits(scales[:tiles], b.scales.t())
    assert not scales[tiles:].any()


def _faked(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b = (torch.empty(rows, k, dtype=E4M3, device="cuda") for rows in (m, n))
    return a, torch.empty(k // 128, m, device="cuda"), b, torch.empty(n // 128, k // 128, device="cuda")


@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 128), (130, 640, 640), (128, 256, 512)])
def test_torch_accepts_the_layouts(m: int, n: int, k: int) -> None:
    """Its own check of shapes and strides, which needs no GPU and (2.13) refuses what cuBLAS would misread."""
    with FakeTensorMode():
        a, a_scales, b, b_scales = _faked(m, n, k)
        y = torch_impl.product_with_blocks(a, a_scales, b, b_scales, torch.bfloat16)
        assert y.shape == (-(-m // 4) * 4, n)
        z = torch_impl.product_with_rows(a, a_scales, a, a_scales)
        assert z.shape == (-(-m // 4) * 4, -(-m // 16) * 16)
        assert z.dtype == torch.float32


@pytest.mark.skipif(ON_GPU, reason="the GPU's torch may be older and check less")
def test_torch_refuses_other_layouts() -> None:
    one, square = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    with FakeTensorMode():
        a, a_scales, b, b_scales = _faked(128, 640, 640)
        with pytest.raises(RuntimeError, match="scale b must have shape"):
            scaled_mm(a, b.t(), a_scales.t(), one, b_scales.t(), square)


@pytest.mark.skipif(ON_GPU, reason="here it runs")
def test_cublas_is_not_on_a_cpu() -> None:
    a, b = rows(4, 128), blocks(128, 128)
    with pytest.raises(BackendUnavailable, match="CPU"):
        torch_impl.gemm(a.values, a.scales, b.values, b.scales, 128, torch.bfloat16, "promoted", 0)
