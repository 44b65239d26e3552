"""Quantisation: every backend bit for bit the reference, and the reference by its definition, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek_kernels import quant
from deepseek_kernels.formats import E4M3, LARGEST, LARGEST_E5M6, SMALLEST_AMAX, Blocks, Packed, Rows, padded
from tests.gpu.setting import DEVICE, ON_GPU, backends, randn, same_bits, size

# the interpreter's numpy tells of every Inf * 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SIZES = [(size(4096, 37), size(7168, 384)), (1, 128), (5, 200), (129, 64), (260, 17), (0, 256), (3, 0)]
DTYPES = [torch.bfloat16, torch.float32]
OTHERS = backends("triton")


def rough(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, and in a few of them whatever a tile may meet."""
    x = randn(m, k, dtype=torch.float32, spread=3.0)
    for row, fill in enumerate((0.0, 1e-20, 1e-38, 3.3e38, 448.0, -0.0)):
        x[1 + row :: 41] = fill * torch.sign(x[1 + row :: 41])
    x[7::41, 3::29] = torch.nan
    x[8::41, 5::61] = torch.inf
    x[9::41, 5::61] = -torch.inf
    x[10::41] = torch.nan
    x[:, 11::64] = 0.0
    return x.to(dtype)


def same_rows(ours: Rows, expected: Rows) -> bool:
    return (
        same_bits(ours.values, expected.values)
        and same_bits(ours.scales, expected.scales)
        and ours.width == expected.width
    )


def same_blocks(ours: Blocks, expected: Blocks) -> bool:
    return (
        same_bits(ours.values, expected.values)
        and same_bits(ours.scales, expected.scales)
        and (ours.rows, ours.width) == (expected.rows, expected.width)
    )


# Every backend is the reference, bit for bit.


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_tiles_are_the_references(m: int, k: int, dtype: torch.dtype, pow2: bool, backend: str) -> None:
    x = rough(m, k, dtype)
    rows = quant.quantise_rows(x, pow2=pow2, backend="reference")
    columns = quant.quantise_columns(x, pow2=pow2, backend="reference")
    assert same_rows(quant.quantise_rows(x, pow2=pow2, backend=backend), rows)
    assert same_rows(quant.quantise_columns(x, pow2=pow2, backend=backend), columns)
    both = quant.quantise_both(x, pow2=pow2, backend=backend)
    assert same_rows(both[0], rows)
    assert same_rows(both[1], columns)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_what_reads_rows_is_the_reference(m: int, k: int, backend: str) -> None:
    for pow2 in (False, True):
        rows = quant.quantise_rows(rough(m, k, torch.float32), pow2=pow2, backend="reference")
        expected = quant.requantise_columns(rows, pow2=pow2, backend="reference")
        assert same_rows(quant.requantise_columns(rows, pow2=pow2, backend=backend), expected)
        for dtype in DTYPES:
            plain = quant.dequantise(rows, dtype, backend="reference")
            assert same_bits(quant.dequantise(rows, dtype, backend=backend), plain)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(size(7168, 256), size(2048, 384)), (1, 128), (130, 200), (1, 100, 72), (3, 257, 136), (0, 128), (2, 5, 0)],
)
def test_blocks_are_the_references(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    w = rough(torch.Size(shape[:-1]).numel(), shape[-1], dtype).view(shape)
    for pow2 in (False, True):
        expected = quant.quantise_blocks(w, pow2=pow2, backend="reference")
        assert same_blocks(quant.quantise_blocks(w, pow2=pow2, backend=backend), expected)
        turned = quant.transpose_blocks(expected, backend="reference")
        assert same_blocks(quant.transpose_blocks(expected, backend=backend), turned)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_e5m6_is_the_references(m: int, k: int, dtype: torch.dtype, backend: str) -> None:
    x = rough(m, k, dtype)
    expected = quant.pack_e5m6(x, backend="reference")
    packed = quant.pack_e5m6(x, backend=backend)
    assert same_bits(packed.words, expected.words)
    assert same_bits(packed.scales, expected.scales)
    assert packed.width == k
    plain = quant.unpack_e5m6(expected, dtype, backend="reference")
    assert same_bits(quant.unpack_e5m6(expected, dtype, backend=backend), plain)


@pytest.mark.parametrize("backend", backends("reference", "triton"))
@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[:, 16:144], lambda x: x[:, 3:70], lambda x: x[::2, ::3]]
)
def test_views_are_what_they_show(view: Callable[[Tensor], Tensor], backend: str) -> None:
    x = view(randn(150, 170, dtype=torch.bfloat16, spread=3.0))
    plain = x.clone(memory_format=torch.contiguous_format)
    for op in (quant.quantise_rows, quant.quantise_columns):
        assert same_rows(op(x, pow2=False, backend=backend), op(plain, pow2=False, backend="reference"))
    both = quant.quantise_both(x, pow2=True, backend=backend)
    expected = quant.quantise_both(plain, pow2=True, backend="reference")
    assert same_rows(both[0], expected[0])
    assert same_rows(both[1], expected[1])
    blocks = quant.quantise_blocks(plain, pow2=True, backend="reference")
    assert same_blocks(quant.quantise_blocks(x, pow2=True, backend=backend), blocks)
    words = quant.pack_e5m6(plain, backend="reference").words
    assert torch.equal(quant.pack_e5m6(x, backend=backend).words, words)


@pytest.mark.skipif(not ON_GPU, reason="takes 20 GB")
@pytest.mark.parametrize("backend", OTHERS)
def test_offsets_pass_32_bits(backend: str) -> None:
    x = torch.randn(2**18 + 128, 2**13, dtype=torch.bfloat16, device=DEVICE)
    low, right = x[-256:], x[:, -64:].contiguous()
    rows, columns = quant.quantise_both(x, pow2=True, backend=backend)
    expected = quant.quantise_rows(low, pow2=True, backend="reference")
    assert same_bits(rows.values[-256:], expected.values)
    assert same_bits(rows.scales[:, -256:], expected.scales)
    expected = quant.quantise_columns(right, pow2=True, backend="reference")
    assert same_bits(columns.values[-64:], expected.values)
    assert same_bits(columns.scales[:, -64:], expected.scales)
    alone = quant.quantise_rows(x, pow2=True, backend=backend)
    assert torch.equal(alone.values.view(torch.uint8), rows.values.view(torch.uint8))
    again = quant.quantise_columns(x, pow2=True, backend=backend)
    assert torch.equal(again.values.view(torch.uint8), columns.values.view(torch.uint8))
    turned = quant.transpose_blocks(Blocks(columns.values, columns.scales, *x.t().shape), backend=backend)
    assert same_bits(turned.values[-128:], columns.values[:, -128:].contiguous().mT.contiguous())
    requantised = quant.requantise_columns(rows, pow2=True, backend=backend)
    tail = Rows(rows.values[:, -128:].contiguous(), rows.scales[-1:].contiguous(), 128)
    expected = quant.requantise_columns(tail, pow2=True, backend="reference")
    assert same_bits(requantised.values[-128:], expected.values)
    plain = quant.dequantise(rows, torch.bfloat16, backend=backend)
    assert same_bits(plain[:, -128:], quant.dequantise(tail, torch.bfloat16, backend="reference"))
    words = quant.pack_e5m6(x, backend=backend)
    few = quant.pack_e5m6(low, backend="reference")
    assert torch.equal(words.words[-256:], few.words)
    unpacked = quant.unpack_e5m6(words, torch.bfloat16, backend=backend)
    assert same_bits(unpacked[-256:], quant.unpack_e5m6(few, torch.bfloat16, backend="reference"))


# The reference is its definition.


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
        assert 1 - 2.0**-24 <= float(ratio.min())
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
    assert same_blocks(turned, quant.quantise_blocks(w.mT, pow2=False, backend="reference"))


@pytest.mark.parametrize("backend", backends("reference", "triton"))
def test_powers_of_two_lose_nothing_twice(backend: str) -> None:
    """A number that went through FP8 once goes through tiles of its own scale or a smaller one unchanged."""
    x = randn(256, 128, spread=1.0)
    once = quant.quantise_rows(x, pow2=True, backend=backend)
    numbers = quant.dequantise(once, torch.float32, backend=backend)
    again = quant.quantise_rows(numbers, pow2=True, backend=backend)
    assert same_bits(quant.dequantise(again, torch.float32, backend=backend), numbers)
    turned = quant.requantise_columns(once, pow2=True, backend=backend)
    assert same_rows(turned, quant.quantise_columns(numbers, pow2=True, backend=backend))


@pytest.mark.parametrize("backend", backends("reference", "triton"))
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


# E5M6.


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


def test_the_fakes_have_the_shapes_of_the_results() -> None:
    x = randn(5, 200, dtype=torch.bfloat16)
    rows = quant.quantise_rows(x, pow2=True, backend="reference")
    packed = quant.pack_e5m6(x, backend="reference")
    for op, arguments in (
        ("quantise_rows", (x, True)),
        ("quantise_columns", (x, True)),
        ("quantise_both", (x, True)),
        ("requantise_columns", (rows.values, rows.scales, 200, True)),
        ("quantise_blocks", (randn(2, 5, 200), True)),
        ("transpose_values", (randn(2, 128, 256).to(E4M3),)),
        ("dequantise", (rows.values, rows.scales, 200, torch.bfloat16)),
        ("pack_e5m6", (x,)),
        ("unpack_e5m6", (packed.words, packed.scales, 200, torch.float32)),
    ):
        for backend in backends("reference", "triton"):
            torch.library.opcheck(
                getattr(torch.ops.deepseek_kernels, op).default,
                arguments,
                {"backend": backend},
                test_utils="test_faketensor",
            )


def test_a_packed_matrix_takes_three_quarters_of_bf16() -> None:
    packed = quant.pack_e5m6(randn(4, 256, dtype=torch.bfloat16), backend="reference")
    assert isinstance(packed, Packed)
    assert packed.words.nbytes == 4 * 256 * 12 // 8
