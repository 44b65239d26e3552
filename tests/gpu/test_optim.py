"""AdamW: Triton bit for bit the reference, and every backend against torch's in float64."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_kernels.optim import adamw
from tests.gpu.setting import DEVICE, backends, randn, same_bits, size

# numpy warns where the interpreter meets the NaN and Inf of these tests
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.95), 1e-8, 0.1
MOMENTS = [torch.float32, torch.bfloat16]
SIZES = [size(20_000_003, 3001), 1024, 5, 1, 0]


def start(n: int, moments: torch.dtype) -> list[Tensor]:
    """Weight, gradient and moments; the gradients' sizes lie far apart, down to denormals of their squares."""
    grad = randn(n) * torch.exp(8.0 * randn(n)) * 1e-4
    exp_avg = (randn(n) * 1e-4).to(moments)
    return [randn(n), grad, exp_avg, exp_avg.square()]


def update(tensors: list[Tensor], step: int, low: Tensor | None, backend: str) -> None:
    adamw(*tensors, LR, *BETAS, EPS, DECAY, step, low=low, backend=backend)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("n", SIZES)
def test_triton_and_the_reference_give_the_same_bits(
    n: int, moments: torch.dtype, copied: bool, backend: str
) -> None:
    ours = start(n, moments)
    if n > 4:
        ours[1][:3] = torch.tensor([torch.nan, torch.inf, 0.0])
    theirs = [one.clone() for one in ours]
    lows = [torch.empty(n, dtype=torch.bfloat16, device=DEVICE) if copied else None for _ in range(2)]
    for step in (1, 2, 1000):
        update(ours, step, lows[0], backend)
        update(theirs, step, lows[1], "reference")
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[2].dtype is moments
    if n > 4:
        assert ours[0][:2].isnan().all()
        assert ours[0][2:].isfinite().all()
    if copied:
        assert same_bits(lows[0], ours[0].bfloat16())
        assert same_bits(lows[1], lows[0])


@pytest.mark.parametrize("backend", backends("reference", "triton", "torch"))
def test_it_is_torchs_adamw(backend: str) -> None:
    tensors = [randn(500), randn(500), torch.zeros(500, device=DEVICE), torch.zeros(500, device=DEVICE)]
    before = tensors[0].double()
    exact = torch.nn.Parameter(before.clone())
    optimizer = torch.optim.AdamW([exact], LR, BETAS, EPS, DECAY)
    for step in range(1, 8):
        tensors[1].copy_(randn(500))
        exact.grad = tensors[1].double()
        optimizer.step()
        update(tensors, step, None, backend)
    state = optimizer.state[exact]
    # A weight is rounded three times a step; a moment is a sum of terms that are rounded a few times each.
    away = (tensors[0] - exact.data).abs()
    assert (away <= 2.0**-24 * 7 * (3 * before.abs() + 12 * LR)).all()
    assert torch.allclose(tensors[2].double(), state["exp_avg"], rtol=0.0, atol=1e-6)
    assert torch.allclose(tensors[3].double(), state["exp_avg_sq"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", backends("reference", "triton", "torch"))
def test_the_update_uses_moments_before_they_are_rounded(backend: str) -> None:
    weight, grad, exp_avg, exp_avg_sq = start(200, torch.bfloat16)
    m = exp_avg.double() * BETAS[0] + grad.double() * (1 - BETAS[0])
    v = exp_avg_sq.double() * BETAS[1] + grad.double().square() * (1 - BETAS[1])
    change = LR * (m / (1 - BETAS[0] ** 9)) / ((v / (1 - BETAS[1] ** 9)).sqrt() + EPS)
    expected = weight.double() * (1 - LR * DECAY) - change
    before = weight.abs()
    update([weight, grad, exp_avg, exp_avg_sq], 9, None, backend)
    # m may be a difference of nearly equal numbers: its error is relative to what it comes from.
    inexact = LR * 2.0**-22 * (exp_avg.double().abs() + grad.double().abs()) / (v.sqrt() + EPS)
    assert ((weight - expected).abs() <= 2.0**-23 * before + 10 * inexact + 2.0**-21 * change.abs()).all()
    for found, exact in ((exp_avg, m), (exp_avg_sq, v)):
        nearest = exact.float().bfloat16()
        assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-7 * grad.double().abs()).all()
        assert (
            found == nearest
        ).float().mean() > 0.98  # but where FP32 and float64 fall on two sides of a half


def test_a_fake_update_changes_nothing_and_is_known_to_write() -> None:
    with FakeTensorMode():
        update([torch.empty(8) for _ in range(4)], 1, torch.empty(8, dtype=torch.bfloat16), "triton")
    written = [a.name for a in torch.ops.deepseek_kernels.adamw.default._schema.arguments if a.is_write]
    assert written == ["weight", "exp_avg", "exp_avg_sq", "low"]
