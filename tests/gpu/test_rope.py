"""Rotary embedding: Triton bit for bit the reference, and every backend against complex numbers in float64."""

import pytest
import torch
from torch import Tensor

from deepseek_kernels.rope import rotate_
from tests.gpu.setting import DEVICE, backends, error, randn, same_bits, size

ALL = backends("reference", "triton", "torch")
# sequences, positions, heads, channels of the whole head, rope channels
SHAPES = [
    (1, size(4096, 9), size(128, 40), 192, 64),
    (2, size(4096, 37), 1, 576, 64),
    (3, 5, 3, 30, 10),
    (1, 1, 1, 2, 2),
    (1, 0, 4, 16, 8),
]


def turns(length: int, size: int, factor: float = 1.0) -> Tensor:
    angles = torch.randn(length, size // 2, device=DEVICE) * 50.0
    return torch.view_as_real(torch.polar(torch.full_like(angles, factor), angles))


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "length", "heads", "head", "rope"), SHAPES)
def test_the_last_channels_turn_as_the_references(
    batch: int, length: int, heads: int, head: int, rope: int, dtype: torch.dtype, inverse: bool, backend: str
) -> None:
    x = randn(batch, length, heads, head, dtype=dtype)
    turns_TR2 = turns(length, rope, 1.3)
    ours, expected = x.clone(), x.clone()
    rotate_(ours[..., head - rope :], turns_TR2, inverse=inverse, backend=backend)
    rotate_(expected[..., head - rope :], turns_TR2, inverse=inverse, backend="reference")
    assert same_bits(ours, expected)
    assert same_bits(ours[..., : head - rope], x[..., : head - rope])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-23)])
def test_turning_is_multiplying_complex_numbers(dtype: torch.dtype, bound: float, backend: str) -> None:
    """Each channel is rounded once (and its two products, in FP32): at most half an eps of its pair's size, or so."""
    x, turns_TR2 = randn(2, 7, 3, 16, dtype=dtype), turns(7, 16, 1.3)
    wide = x.double().requires_grad_()
    factors = torch.view_as_complex(turns_TR2.double())[:, None]
    exact = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * factors).flatten(-2)
    dy = randn(2, 7, 3, 16, dtype=dtype)
    exact.backward(dy.double())
    rotate_(x, turns_TR2, inverse=False, backend=backend)
    assert error(x, exact.detach()) < bound
    rotate_(dy, turns_TR2, inverse=True, backend=backend)
    assert wide.grad is not None
    assert error(dy, wide.grad) < bound


@pytest.mark.parametrize("backend", ALL)
def test_any_order_of_axes_and_a_nan(backend: str) -> None:
    """[B, H, T, R] in memory; a NaN takes its pair and no other."""
    turns_TR2 = turns(6, 8)
    x = randn(2, 3, 6, 8)
    x[1, 2, 5, 3] = torch.nan
    y = x.transpose(1, 2).contiguous()
    rotate_(x.transpose(1, 2), turns_TR2, inverse=False, backend=backend)
    rotate_(y, turns_TR2, inverse=False, backend="reference")
    assert backend == "torch" or same_bits(x.transpose(1, 2).contiguous(), y)
    assert torch.allclose(x.transpose(1, 2), y, rtol=0.0, atol=1e-5, equal_nan=True)
    assert x.isnan().nonzero().tolist() == [[1, 2, 5, 2], [1, 2, 5, 3]]


def test_what_cannot_be_turned_in_place_is_refused() -> None:
    x = randn(2, 6, 3, 8)
    with pytest.raises(ValueError, match="do not fit"):
        rotate_(x, turns(5, 8), inverse=False, backend="reference")
    with pytest.raises(ValueError, match="do not fit"):
        rotate_(x[..., :7], turns(6, 8), inverse=False, backend="reference")
    with pytest.raises(ValueError, match="contiguous"):
        rotate_(randn(2, 6, 3, 16)[..., ::2], turns(6, 8), inverse=False, backend="reference")
    with pytest.raises(ValueError, match="before expanding"):
        rotate_(x[:, :, :1].expand(-1, -1, 4, -1), turns(6, 8), inverse=False, backend="reference")


@pytest.mark.parametrize("backend", ALL)
def test_the_op_is_what_its_schema_and_fake_say(backend: str) -> None:
    torch.library.opcheck(
        torch.ops.deepseek_kernels.rotate_.default,
        (randn(1, 6, 3, 8), turns(6, 8), False),
        {"backend": backend},
        test_utils=("test_schema", "test_faketensor"),
    )
