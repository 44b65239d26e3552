"""RMSNorm: every backend against its formula in float64; with quantisation, the tiles of its own y, bit for bit."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_kernels.formats import Rows
from deepseek_kernels.norm import rms_norm, rms_norm_backward, rms_norm_gain_gradient, rms_norm_quantise
from deepseek_kernels.quant import quantise_rows
from tests.gpu.setting import DEVICE, backends, error, randn, same_bits, size

# numpy warns where the interpreter meets the NaN and Inf of these tests
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS = 1e-6
BACKENDS = backends("reference", "triton")
DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
ADDING = 64 * 2.0**-24  # what FP32 sums along a row may lose: no value goes through more than 64 additions
SIZES = [
    (size(4096, 9), size(7168, 1536)),
    (size(4096, 5), 512),
    (1, 2048),
    (3, 200),
    (7, 1),
    (2, 131),
    (0, 256),
]


def exact(x_MD: Tensor, gain_D: Tensor) -> Tensor:
    x_MD = x_MD.double()
    return x_MD * (x_MD.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain_D.double()


def operands(m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(m, d, dtype=dtype, spread=2.0), randn(d, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_norm_is_its_formula(m: int, d: int, dtype: torch.dtype, backend: str) -> None:
    x, gain = operands(m, d, dtype)
    y, scale = rms_norm(x, gain, EPS, backend=backend)
    expected = exact(x, gain)
    assert y.dtype is dtype
    assert scale.dtype is torch.float32
    assert ((y - expected).abs() <= (2.02 * ROUNDING[dtype] + ADDING) * expected.abs()).all()
    mean = x.double().square().mean(-1)
    assert torch.allclose(scale.double(), (mean + EPS).rsqrt(), rtol=ADDING, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_quantised_is_the_y_beside_it(m: int, d: int, dtype: torch.dtype, pow2: bool, backend: str) -> None:
    x, gain = operands(m, d, dtype)
    if m > 2:
        x[0, d // 2], x[1, 0], x[2] = torch.nan, torch.inf, 0.0
    y, scale, rows = rms_norm_quantise(x, gain, EPS, pow2=pow2, backend=backend)
    y_alone, scale_alone = rms_norm(x, gain, EPS, backend=backend)
    expected = quantise_rows(y, pow2=pow2, backend="reference")
    assert_within(scale, scale_alone, 2 * ADDING)
    assert_within(y, y_alone, 2.02 * ROUNDING[dtype] + 2 * ADDING)  # either cast may fall to the other side
    assert same_bits(rows.values, expected.values)
    assert same_bits(rows.scales, expected.scales)
    assert rows.width == d


def assert_within(found: Tensor, expected: Tensor, relative: float) -> None:
    """No number where the other is none."""
    away = (found.double() - expected.double()).abs()
    numbers = expected.isfinite()
    assert torch.equal(numbers, found.isfinite())
    assert (away <= relative * expected.double().abs())[numbers].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_stays_none_and_in_its_row(backend: str) -> None:
    x, gain = operands(3, 300, torch.bfloat16)
    x[0, 299], x[1, 7] = torch.nan, -torch.inf
    y, scale = rms_norm(x, gain, EPS, backend=backend)
    dx = rms_norm_backward(randn(3, 300, dtype=torch.bfloat16), x, scale, gain, backend=backend)
    assert y[0].isnan().all()
    assert y[1, 7].isnan()
    assert dx[0].isnan().all()
    assert dx[1].isnan().all()
    assert y[2].isfinite().all()
    assert dx[2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_backward_is_autograds(m: int, d: int, dtype: torch.dtype, backend: str) -> None:
    x, gain = operands(m, d, dtype)
    dy = randn(m, d, dtype=dtype)
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(wide, gain), wide, dy.double())
    scale = rms_norm(x, gain, EPS, backend="reference")[1]
    found = rms_norm_backward(dy, x, scale, gain, backend=backend)
    assert found.dtype is dtype
    if d > 1:
        assert error(found, expected) <= ROUNDING[dtype] + ADDING
    else:  # a single channel's sign is all that is left of it: the gradient is a difference of equals
        assert ((found - expected).abs() <= 2 * ADDING * (dy * gain * scale.unsqueeze(-1)).abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d"), [(size(4096, 300), size(7168, 200)), *SIZES[2:]])
def test_gain_gradient_is_added_in_one_order(m: int, d: int, dtype: torch.dtype, backend: str) -> None:
    x, gain = operands(m, d, dtype)
    dy, before = randn(m, d, dtype=dtype), randn(d)
    scale = rms_norm(x, gain, EPS, backend="reference")[1]
    sums = [before.clone(), before.clone()]
    for into in sums:
        rms_norm_gain_gradient(dy, x, scale, into, backend=backend)
    normed = (x.float() * scale.unsqueeze(-1)).to(dtype)
    terms = dy.double() * normed.double()
    away = (sums[0] - before.double() - terms.sum(0)).abs()
    assert (away <= (m + 1) * 2.0**-24 * (terms.abs().sum(0) + before.abs())).all()
    assert same_bits(*sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gain_gradient_is_autograds(backend: str) -> None:
    x, gain = operands(40, 96, torch.float32)
    dy, into = randn(40, 96), torch.zeros(96, device=DEVICE)
    wide = gain.double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(x, wide), wide, dy.double())
    scale = rms_norm(x, gain, EPS, backend=backend)[1]
    rms_norm_gain_gradient(dy, x, scale, into, backend=backend)
    assert error(into, expected) <= ADDING


@pytest.mark.parametrize("backend", backends("triton"))
def test_strided_operands_are_read_as_they_are(backend: str) -> None:
    x, gain = operands(4, 130, torch.float32)
    wide_x, wide_gain = torch.stack([x, x], -1)[..., 0], torch.stack([gain, gain], -1)[..., 0]
    y, scale = rms_norm(x, gain, EPS, backend=backend)
    found = rms_norm(wide_x, wide_gain, EPS, backend=backend)
    assert same_bits(found[0], y)
    assert same_bits(found[1], scale)
    dx = rms_norm_backward(wide_x, wide_x, scale, wide_gain, backend=backend)
    assert same_bits(dx, rms_norm_backward(x, x, scale, gain, backend=backend))
    sums = [torch.zeros(130, device=DEVICE) for _ in range(2)]
    rms_norm_gain_gradient(x, x, scale, sums[0], backend=backend)
    rms_norm_gain_gradient(wide_x, wide_x, scale, sums[1], backend=backend)
    assert same_bits(*sums)


def test_fakes_are_shaped_as_the_real() -> None:
    x, gain = operands(5, 200, torch.bfloat16)
    real = [*rms_norm(x, gain, EPS, backend="reference")]
    real += parts(rms_norm_quantise(x, gain, EPS, pow2=True, backend="reference"))
    real += [rms_norm_backward(x, x, real[1], gain, backend="reference")]
    with FakeTensorMode() as mode:
        x, gain = mode.from_tensor(x), mode.from_tensor(gain)
        fake = [*rms_norm(x, gain, EPS, backend="triton")]
        fake += parts(rms_norm_quantise(x, gain, EPS, pow2=True, backend="triton"))
        fake += [rms_norm_backward(x, x, fake[1], gain, backend="triton")]
        rms_norm_gain_gradient(x, x, fake[1], torch.empty(200), backend="triton")
    assert [(one.shape, one.dtype) for one in fake] == [(one.shape, one.dtype) for one in real]


def parts(found: tuple[Tensor, Tensor, Rows]) -> list[Tensor]:
    return [*found[:2], found[2].values, found[2].scales]
