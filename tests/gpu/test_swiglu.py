"""SwiGLU: every backend against its formula in float64; quantised, bit for bit what the same backend
computes in FP32."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from deepseek_kernels.formats import Rows
from deepseek_kernels.quant import dequantise, quantise_columns, quantise_rows
from deepseek_kernels.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_backward_quantise,
    swiglu_quantise,
    swiglu_quantise_columns,
)
from tests.gpu.setting import backends, error, randn, same_bits, size

# numpy warns where the interpreter meets the NaN and Inf of these tests
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BACKENDS = backends("reference", "triton", "cuda")
DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# The exponential's argument x log2(e) is rounded: |gate| 2^-23, for gates up to 64; and a few roundings.
COMPUTING = 2.0**-16
SIZES = [(size(4096, 130), size(2048, 256)), (35, 200), (1, 128), (2, 7), (0, 128), (129, 64)]
TWOS = list(product([False, True], repeat=2))


def exact(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    y = functional.silu(gate) * up
    return y if weight is None else y * weight.double().unsqueeze(-1)


def operands(m: int, f: int, dtype: torch.dtype, weighted: bool) -> tuple[Tensor, Tensor | None]:
    gate_up = randn(m, 2 * f, spread=1.0).clamp(-16, 16) * 4
    return gate_up.to(dtype), randn(m).sigmoid() if weighted else None


def forms(gate_up: Tensor) -> list[tuple[Tensor | Rows, Tensor]]:
    """What the functions may be given, and what it stands for in FP32."""
    rows = quantise_rows(gate_up, pow2=False, backend="reference")
    return [(gate_up, gate_up.float()), (rows, dequantise(rows, torch.float32, backend="reference"))]


def same_rows(a: Rows, b: Rows) -> bool:
    return a.width == b.width and same_bits(a.values, b.values) and same_bits(a.scales, b.scales)


def by_rows(x: Tensor, pow2: bool) -> Rows:
    return quantise_rows(x, pow2=pow2, backend="reference")


def by_columns(x: Tensor, pow2: bool) -> Rows:
    return quantise_columns(x, pow2=pow2, backend="reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "f"), SIZES)
def test_swiglu_is_its_formula(m: int, f: int, dtype: torch.dtype, weighted: bool, backend: str) -> None:
    gate_up, weight = operands(m, f, dtype, weighted)
    y, expected = swiglu(gate_up, weight, backend=backend), exact(gate_up, weight)
    assert y.dtype is dtype
    assert ((y - expected).abs() <= (ROUNDING[dtype] + COMPUTING) * expected.abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weighted", "pow2"), TWOS)
@pytest.mark.parametrize(("m", "f"), SIZES)
def test_quantised_is_the_fp32_activation(m: int, f: int, weighted: bool, pow2: bool, backend: str) -> None:
    gate_up, weight = operands(m, f, torch.bfloat16, weighted)
    for form, wide in forms(gate_up):
        y = swiglu(wide, weight, backend=backend)
        rows = swiglu_quantise(form, weight, pow2=pow2, backend=backend)
        columns = swiglu_quantise_columns(form, weight, pow2=pow2, backend=backend)
        assert same_rows(rows, by_rows(y, pow2))
        assert same_rows(columns, by_columns(y, pow2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "f"), SIZES)
def test_backward_is_autograds(m: int, f: int, dtype: torch.dtype, weighted: bool, backend: str) -> None:
    gate_up, weight = operands(m, f, dtype, weighted)
    dy = randn(m, f, dtype=dtype)
    for form, wide in forms(gate_up):
        inputs = [one.double().requires_grad_() for one in (wide, weight) if one is not None]
        expected = torch.autograd.grad(exact(*inputs, *([] if weighted else [None])), inputs, dy.double())
        found = swiglu_backward(dy, form, weight, backend=backend)
        assert found[0].dtype is dtype
        assert error(found[0], expected[0]) <= ROUNDING[dtype] + COMPUTING
        if weight is None:
            assert found[1] is None
            continue
        assert found[1].dtype is torch.float32
        terms = dy.double() * exact(wide, None)
        assert ((found[1] - expected[1]).abs() <= COMPUTING * terms.abs().sum(-1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weighted", "pow2"), TWOS)
@pytest.mark.parametrize(("m", "f"), SIZES)
def test_backward_quantised_is_the_fp32_gradient(
    m: int, f: int, weighted: bool, pow2: bool, backend: str
) -> None:
    gate_up, weight = operands(m, f, torch.bfloat16, weighted)
    dy = randn(m, f, dtype=torch.bfloat16)
    for form, wide in forms(gate_up):
        d_gate_up, d_weight = swiglu_backward(dy.float(), wide, weight, backend=backend)
        rows, columns, found = swiglu_backward_quantise(dy, form, weight, pow2=pow2, backend=backend)
        assert same_rows(rows, by_rows(d_gate_up, pow2))
        assert same_rows(columns, by_columns(d_gate_up, pow2))
        if weight is None:
            assert found is None
        else:
            terms = (dy.float() * swiglu(wide, None, backend="reference")).abs().sum(-1)
            assert ((found - d_weight).abs() <= COMPUTING * terms).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f", [128, 72])
def test_padding_rows_stay_zero(f: int, backend: str) -> None:
    gate_up, weight = operands(128, f, torch.bfloat16, True)
    dy = randn(128, f, dtype=torch.bfloat16)
    for one in (gate_up, weight, dy):
        one[100:] = 0
    for form, _ in forms(gate_up):
        rows, columns, d_weight = swiglu_backward_quantise(dy, form, weight, pow2=True, backend=backend)
        zeros = [
            swiglu(gate_up, weight, backend=backend)[100:],
            swiglu_quantise(form, weight, pow2=True, backend=backend).values[100:],
            swiglu_quantise_columns(form, weight, pow2=True, backend=backend).values[:, 100:],
            swiglu_backward(dy, form, weight, backend=backend)[0][100:],
            rows.values[100:],
            columns.values[:, 100:],
            d_weight[100:],
        ]
        assert not any(one.float().any() for one in zeros)
        assert all(one.float().isfinite().all() for one in zeros)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f", [128, 72])
def test_what_is_no_number_stays_none_and_out_of_the_padding(f: int, backend: str) -> None:
    gate_up, weight = operands(5, f, torch.bfloat16, True)
    dy = randn(5, f, dtype=torch.bfloat16)
    gate_up[0, 3], gate_up[1, f + 5], weight[2], dy[3, 6] = torch.nan, -torch.inf, torch.nan, torch.nan
    y = swiglu(gate_up, weight, backend=backend)
    rows = swiglu_quantise(gate_up, weight, pow2=False, backend=backend)
    columns = swiglu_quantise_columns(gate_up, weight, pow2=False, backend=backend)
    gradient, _ = swiglu_backward(dy.float(), gate_up, weight, backend=backend)
    both = swiglu_backward_quantise(dy, gate_up, weight, pow2=False, backend=backend)
    wide = swiglu(gate_up.float(), weight, backend=backend)
    assert same_rows(rows, by_rows(wide, False))
    assert same_rows(columns, by_columns(wide, False))
    assert same_rows(both[0], by_rows(gradient, False))
    assert same_rows(both[1], by_columns(gradient, False))
    assert y[0, 3].isnan()
    assert y[1, 5].isinf()
    assert y[2].isnan().all()
    assert gradient[3, [6, f + 6]].isnan().all()
    assert y[3:].isfinite().all()
    assert gradient[4].isfinite().all()


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
def test_strided_operands_are_read_as_they_are(backend: str) -> None:
    gate_up, weight = operands(6, 128, torch.float32, True)
    dy = randn(6, 128)
    strided = [torch.stack([one, one], -1)[..., 0] for one in (dy, gate_up, weight)]
    assert not any(one.is_contiguous() for one in strided)
    expected = everything(dy, gate_up, gate_up, weight, backend)
    found = everything(strided[0], strided[1], strided[1], strided[2], backend)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_fakes_are_shaped_as_the_real(weighted: bool, quantised: bool) -> None:
    gate_up, weight = operands(35, 200, torch.bfloat16, weighted)
    form, dy = forms(gate_up)[quantised][0], gate_up[:, :200].contiguous()
    real = everything(dy, gate_up, form, weight, "reference")
    with FakeTensorMode() as mode:
        if isinstance(form, Rows):
            form = Rows(mode.from_tensor(form.values), mode.from_tensor(form.scales), form.width)
        else:
            form = mode.from_tensor(form)
        weight = None if weight is None else mode.from_tensor(weight)
        fake = everything(mode.from_tensor(dy), mode.from_tensor(gate_up), form, weight, "triton")
    assert [(one.shape, one.dtype) for one in fake] == [(one.shape, one.dtype) for one in real]


def everything(
    dy: Tensor, gate_up: Tensor, form: Tensor | Rows, weight: Tensor | None, backend: str
) -> list[Tensor]:
    """All results of all functions."""
    results = [
        swiglu(gate_up, weight, backend=backend),
        swiglu_quantise(form, weight, pow2=True, backend=backend),
        swiglu_quantise_columns(form, weight, pow2=True, backend=backend),
        *swiglu_backward(dy, form, weight, backend=backend),
        *swiglu_backward_quantise(dy, form, weight, pow2=True, backend=backend),
    ]
    both = [[one.values, one.scales] if isinstance(one, Rows) else [one] for one in results]
    return [one for some in both for one in some if one is not None]
