"""Quantisation: every backend bit for bit the reference, whatever the shapes and values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek_kernels import quant
from deepseek_kernels.formats import E4M3, LARGEST, LARGEST_E5M6, Blocks, Rows
from tests.gpu.setting import DEVICE, ON_GPU, backends, randn, same, same_bits, size

# the interpreter's numpy tells of every Inf * 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SIZES = [(size(4096, 37), size(7168, 384)), (1, 128), (5, 200), (129, 64), (260, 17), (0, 256), (3, 0)]
DTYPES = [torch.bfloat16, torch.float32]
OTHERS = backends("triton", "cuda")


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


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_tiles_are_the_references(m: int, k: int, dtype: torch.dtype, pow2: bool, backend: str) -> None:
    x = rough(m, k, dtype)
    rows = quant.quantise_rows(x, pow2=pow2, backend="reference")
    columns = quant.quantise_columns(x, pow2=pow2, backend="reference")
    assert same(quant.quantise_rows(x, pow2=pow2, backend=backend), rows)
    assert same(quant.quantise_columns(x, pow2=pow2, backend=backend), columns)
    both = quant.quantise_both(x, pow2=pow2, backend=backend)
    assert same(both[0], rows)
    assert same(both[1], columns)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_what_reads_rows_is_the_reference(m: int, k: int, backend: str) -> None:
    for pow2 in (False, True):
        rows = quant.quantise_rows(rough(m, k, torch.float32), pow2=pow2, backend="reference")
        expected = quant.requantise_columns(rows, pow2=pow2, backend="reference")
        assert same(quant.requantise_columns(rows, pow2=pow2, backend=backend), expected)
        for dtype in DTYPES:
            plain = quant.dequantise(rows, dtype, backend="reference")
            assert same_bits(quant.dequantise(rows, dtype, backend=backend), plain)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (size(7168, 256), size(2048, 384)),
        (1, 128),
        (130, 200),
        (1, 100, 72),
        (3, 257, 136),
        (0, 128),
        (2, 5, 0),
    ],
)
def test_blocks_are_the_references(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    w = rough(torch.Size(shape[:-1]).numel(), shape[-1], dtype).view(shape)
    for pow2 in (False, True):
        expected = quant.quantise_blocks(w, pow2=pow2, backend="reference")
        assert same(quant.quantise_blocks(w, pow2=pow2, backend=backend), expected)
        turned = quant.transpose_blocks(expected, backend="reference")
        assert same(quant.transpose_blocks(expected, backend=backend), turned)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_e5m6_is_the_references(m: int, k: int, dtype: torch.dtype, backend: str) -> None:
    x = rough(m, k, dtype)
    expected = quant.pack_e5m6(x, backend="reference")
    packed = quant.pack_e5m6(x, backend=backend)
    assert same(packed, expected)
    plain = quant.unpack_e5m6(expected, dtype, backend="reference")
    assert same_bits(quant.unpack_e5m6(expected, dtype, backend=backend), plain)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("largest", [LARGEST, LARGEST_E5M6])
def test_scales_turn_over_where_the_references_do(largest: float, backend: str) -> None:
    """Largest magnitudes on either side of ``largest`` times every power of two."""
    powers = torch.exp2(torch.arange(-104.0, 120.0, device=DEVICE))
    edge = (largest * powers).clamp(max=torch.finfo(torch.float32).max)
    up, down = edge.nextafter(2 * edge), edge.nextafter(0 * edge)
    x = torch.stack([edge, up, down, torch.rand_like(edge) * edge], 1).flatten()[:, None].repeat(1, 128)
    for pow2 in (False, True):
        rows = quant.quantise_rows(x, pow2=pow2, backend="reference")
        assert same(quant.quantise_rows(x, pow2=pow2, backend=backend), rows)
    packed = quant.pack_e5m6(x, backend="reference")
    assert same_bits(quant.pack_e5m6(x, backend=backend).scales, packed.scales)


@pytest.mark.parametrize("backend", backends("reference", "triton", "cuda"))
@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[:, 16:144], lambda x: x[:, 3:70], lambda x: x[::2, ::3]]
)
def test_views_are_what_they_show(view: Callable[[Tensor], Tensor], backend: str) -> None:
    x = view(randn(150, 170, dtype=torch.bfloat16, spread=3.0))
    plain = x.clone(memory_format=torch.contiguous_format)
    for op in (quant.quantise_rows, quant.quantise_columns):
        assert same(op(x, pow2=False, backend=backend), op(plain, pow2=False, backend="reference"))
    both = quant.quantise_both(x, pow2=True, backend=backend)
    expected = quant.quantise_both(plain, pow2=True, backend="reference")
    assert same(both[0], expected[0])
    assert same(both[1], expected[1])
    blocks = quant.quantise_blocks(plain, pow2=True, backend="reference")
    assert same(quant.quantise_blocks(x, pow2=True, backend=backend), blocks)
    packed = quant.pack_e5m6(plain, backend="reference")
    assert same(quant.pack_e5m6(x, backend=backend), packed)


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
        for backend in backends("reference", "triton", "cuda"):
            torch.library.opcheck(
                getattr(torch.ops.deepseek_kernels, op).default,
                arguments,
                {"backend": backend},
                test_utils="test_faketensor",
            )
