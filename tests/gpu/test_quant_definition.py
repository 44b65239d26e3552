"""Quantisation by its definition, in float64: that of the reference, which the other backends equal bit for bit."""

import pytest
import torch
from torch import Tensor

from deepseek_kernels import quant
from deepseek_kernels.formats import E4M3, LARGEST, LARGEST_E5M6, SMALLEST_AMAX, padded
from tests.gpu.setting import DEVICE, backends, randn, same, same_bits

# the interpreter's numpy tells of every Inf * 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.bfloat16, torch.float32]


def half_step(x: Tensor, fraction: int, smallest: int) -> Tensor:
    """Half the distance of neighbours around |x| in a format of so many fraction bits and this least exponent."""
    exponent = torch.frexp(x.abs())[1] - 1
    return torch.exp2((exponent.clamp(min=smallest) - fraction - 1).double())


def spread_scales(scales: Tensor, width: int) -> Tensor:
    """[K / 128, M] -> float64 [M, K]."""
    return scales.double().t().repeat_interleave(128, 1)[:, :width]


def check_scales(scales: Tensor, amax: Tensor, largest: float, pow2: bool) -> None:
    exact = amax.double().clamp(min=SMALLEST_AMAX) / largest
    if pow2:
        assert bool((torch.frexp(scales)[0] == 0.5).all())
        ratio = scales.double() / exact
        assert float(ratio.min()) >= 1 - 2.0**-24
        assert float(ratio.max()) < 2
    else:
        torch.testing.assert_close(scales.double(), exact, rtol=2.0**-24, atol=0)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_is_the_nearest(dtype: torch.dtype, pow2: bool) -> None:
    x = randn(70, 384, dtype=dtype, spread=4.0)
    x[3] *= 1e-20
    rows = quant.quantise_rows(x, pow2=pow2, backend="reference")
    check_scales(rows.scales, x.double().abs().unflatten(1, (3, 128)).amax(-1).t(), LARGEST, pow2)
    scale = spread_scales(rows.scales, 384)
    scaled = x.double() / scale
    # 1 / scale and the product are rounded to FP32 before the value is
    off = (rows.values.double() - scaled).abs() - scaled.abs() * 2.0**-22
    assert bool((off <= half_step(scaled, 3, -6)).all())
    assert bool((rows.values.double().abs().unflatten(1, (3, 128)).amax(-1) >= LARGEST / 2).all())


def test_the_order_of_a_tile_stays() -> None:
    x = randn(20, 128).sort(dim=1).values
    for y in (
        quant.dequantise(
            quant.quantise_rows(x, pow2=False, backend="reference"), torch.float32, backend="reference"
        ),
        quant.unpack_e5m6(quant.pack_e5m6(x, backend="reference"), torch.float32, backend="reference"),
    ):
        assert bool((y.diff(dim=1) >= 0).all())
        assert bool((y.diff(dim=1) > 0).any())


def test_what_e4m3_holds_comes_back() -> None:
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(E4M3).float()
    x = torch.where(numbers.isnan(), LARGEST, numbers).view(2, 128)
    x = x * torch.exp2(torch.arange(-60.0, 60.0, 20.0, device=DEVICE))[:, None, None]
    x = x.flatten(0, 1)
    for pow2 in (False, True):
        rows = quant.quantise_rows(x, pow2=pow2, backend="reference")
        assert same_bits(quant.dequantise(rows, torch.float32, backend="reference"), x)


def test_columns_are_rows_of_the_transpose() -> None:
    x = randn(200, 70, dtype=torch.bfloat16, spread=3.0)
    columns = quant.quantise_columns(x, pow2=True, backend="reference")
    assert (columns.values.shape, columns.scales.shape) == ((70, 256), (2, 70))
    for m in range(0, 200, 128):
        tile = x[m : m + 128].double()
        check_scales(columns.scales[m // 128], tile.abs().amax(0), LARGEST, pow2=True)
        scaled = (tile / columns.scales[m // 128].double()).t()
        off = (columns.values[:, m : m + len(tile)].double() - scaled).abs()
        assert bool((off <= half_step(scaled, 3, -6)).all())
    assert bool((columns.values[:, 200:].float() == 0).all())


@pytest.mark.parametrize("shape", [(200, 130), (1, 200, 130), (3, 128, 260)])
def test_blocks_share_a_scale(shape: tuple[int, ...]) -> None:
    w = randn(*shape, spread=2.0)
    blocks = quant.quantise_blocks(w, pow2=False, backend="reference")
    n, k = shape[-2:]
    assert blocks.values.shape == (*shape[:-2], padded(n), padded(k))
    for i in range(0, n, 128):
        for j in range(0, k, 128):
            block = w[..., i : i + 128, j : j + 128].double()
            scale = blocks.scales[..., i // 128, j // 128]
            check_scales(scale, block.abs().amax((-2, -1)), LARGEST, pow2=False)
            scaled = block / scale.double()[..., None, None]
            values = blocks.values[..., i : i + block.shape[-2], j : j + block.shape[-1]].double()
            assert bool(((values - scaled).abs() <= half_step(scaled, 3, -6) + scaled.abs() * 2.0**-22).all())
    assert bool((blocks.values.float()[..., n:, :] == 0).all())
    assert bool((blocks.values.float()[..., k:] == 0).all())
    turned = quant.transpose_blocks(blocks, backend="reference")
    assert same(turned, quant.quantise_blocks(w.mT, pow2=False, backend="reference"))


@pytest.mark.parametrize("backend", backends("reference", "triton", "cuda"))
def test_powers_of_two_lose_nothing_twice(backend: str) -> None:
    """A number that went through FP8 once goes through tiles of its own scale or a smaller one unchanged."""
    x = randn(256, 128, spread=1.0)
    once = quant.quantise_rows(x, pow2=True, backend=backend)
    numbers = quant.dequantise(once, torch.float32, backend=backend)
    again = quant.quantise_rows(numbers, pow2=True, backend=backend)
    assert same_bits(quant.dequantise(again, torch.float32, backend=backend), numbers)
    turned = quant.requantise_columns(once, pow2=True, backend=backend)
    assert same(turned, quant.quantise_columns(numbers, pow2=True, backend=backend))


@pytest.mark.parametrize("backend", backends("reference", "triton", "cuda"))
def test_nan_and_inf_are_not_hidden(backend: str) -> None:
    x = randn(4, 256)
    x[0, 3], x[1, 4], x[2] = torch.nan, torch.inf, torch.nan
    for y in (
        quant.dequantise(quant.quantise_rows(x, pow2=True, backend=backend), torch.float32, backend=backend),
        quant.unpack_e5m6(quant.pack_e5m6(x, backend=backend), torch.float32, backend=backend),
    ):
        lost = torch.zeros(4, 256, dtype=torch.bool, device=DEVICE)
        lost[0, 3] = lost[1, :128] = lost[2] = True
        assert torch.equal(y.isnan(), lost)
        assert bool((y - x)[~lost].abs().max() < 0.5)


def test_an_e5m6_value_is_the_nearest() -> None:
    x = randn(70, 256, dtype=torch.bfloat16, spread=4.0)
    packed = quant.pack_e5m6(x, backend="reference")
    check_scales(packed.scales, x.double().abs().unflatten(1, (2, 128)).amax(-1).t(), LARGEST_E5M6, pow2=True)
    y = quant.unpack_e5m6(packed, torch.bfloat16, backend="reference")
    scale = spread_scales(packed.scales, 256)
    # BF16 has 7 fraction bits: FP16 holds them exactly, so that there is one rounding only
    off = (y.double() - x.double()).abs()
    assert bool((off <= half_step(x.double() / scale, 6, -14) * scale).all())
    normal = x.double().abs() / scale >= 2.0**-14
    assert bool((off <= x.double().abs() * 2.0**-7)[normal].all())


def test_what_e5m6_holds_comes_back_from_its_place() -> None:
    """Every finite code, in a row whose scale is 1, and the bits where the format says that they lie."""
    codes = torch.arange(4096, device=DEVICE).view(32, 128)
    numbers = (codes << 4).to(torch.int16).view(torch.float16).float()
    finite = numbers.isfinite()
    x = torch.where(finite, numbers, 0.0)
    x[:, 5] = LARGEST_E5M6  # the scale 1
    codes = torch.where(finite, codes, 0)
    codes[:, 5] = 0x7BF
    packed = quant.pack_e5m6(x, backend="reference")
    assert bool((packed.scales == 1).all())
    assert same_bits(quant.unpack_e5m6(packed, torch.float32, backend="reference"), x)
    for row in range(0, 32, 5):
        whole = sum(int(code) << 12 * j for j, code in enumerate(codes[row].tolist()))
        words = [whole >> 32 * i & 0xFFFFFFFF for i in range(48)]
        assert [word & 0xFFFFFFFF for word in packed.words[row].tolist()] == words


def test_a_packed_matrix_takes_three_quarters_of_bf16() -> None:
    packed = quant.pack_e5m6(randn(4, 256, dtype=torch.bfloat16), backend="reference")
    assert packed.words.nbytes == 4 * 256 * 12 // 8
