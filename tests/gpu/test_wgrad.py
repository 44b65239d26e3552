"""Weight gradients outside FP8: summed in FP32, added to what is there."""

import pytest
import torch

from deepseek_kernels.machine import BackendUnavailable
from deepseek_kernels.norm import rms_norm
from deepseek_kernels.wgrad import weight_gradient
from tests.gpu.setting import DEVICE, error, randn, size


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("m", "n", "k"), [(size(4096, 300), 200, size(7168, 70)), (1, 3, 5), (0, 4, 4)])
def test_it_is_the_sum_of_outer_products(m: int, n: int, k: int, backend: str) -> None:
    """BF16 products are exact in FP32; m of them are added in some order: m roundings of 2^-24 at the very most."""
    dy, x = randn(m, n, dtype=torch.bfloat16), randn(m, k, dtype=torch.bfloat16)
    into = randn(n, k)
    exact = into.double() + dy.double().t() @ x.double()
    weight_gradient(dy, x, into, backend=backend)
    assert error(into, exact) <= max(m, 1) * 2**-24


def test_bf16_cannot_count_to_600_but_the_sum_can() -> None:
    into = torch.zeros(1, 1, device=DEVICE)
    ones = torch.ones(300, 1, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(2):
        weight_gradient(ones, ones, into, backend="torch")
    assert into.item() == 600


def test_apex_is_asked_for_by_its_symbols() -> None:
    """Not installed on any machine of ours; if it ever is, this test says that there is something to test."""
    x = randn(4, 8, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="wgrad_gemm_accum_fp32.*build apex"):
        weight_gradient(x, x, torch.zeros(8, 8, device=DEVICE), backend="ext")
    with pytest.raises(BackendUnavailable, match="fused_layer_norm_cuda.*build apex"):
        rms_norm(x, x[0], 1e-6, backend="ext")
