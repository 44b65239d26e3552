"""Block-scaled products: the reference by its definition in float64, every backend within what its sums can lose."""

from importlib.util import find_spec

import pytest
import torch

from deepseek_kernels.formats import Groups
from deepseek_kernels.gemm import gemm, gemm_add, grouped_gemm, grouped_gemm_add
from deepseek_kernels.machine import BackendUnavailable
from deepseek_kernels.quant import quantise_blocks, quantise_rows
from tests.gpu.products import (
    BACKENDS,
    GROUPED_BACKENDS,
    Exact,
    added,
    blocks,
    grouped_columns,
    grouped_rows,
    plain,
    rows,
)
from tests.gpu.setting import DEVICE, ON_GPU, error, randn, same_bits, size

# M, N, K: two bands of row tiles, a half tile of columns first and last, N and K that are no tiles, wide tiles of which
# the last is cut, fewer columns than results are written at once, one row, none
SHAPES = [
    (size(4096, 130), 576, size(7168, 384)),
    (size(4096, 2100), size(7168, 60), size(2048, 128)),
    (size(4096, 130), size(7112, 328), 256),
    (65, 40, 384),
    (1, 200, 200),
    (65, 33, 640),
    (0, 128, 128),
]
# Tokens by expert: none, less than a tile, a whole tile, more; and nobody at all
SPLITS = [(0, size(1500, 130), 1, 0, size(8192, 128), 0), (0, 0, 0), (5,)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_product_is_the_matrices(m: int, n: int, k: int, dtype: torch.dtype, backend: str) -> None:
    a, b = rows(m, k), blocks(n, k)
    y = gemm(a, b, dtype=dtype, backend=backend)
    exact = Exact.of(plain(a), plain(b))
    assert y.shape == (m, n)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert exact.off(y, backend) <= 1


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("m", "n", "tokens"),
    [
        (size(7168, 200), size(2048, 136), size(4096, 384)),
        (size(7168, 130), size(7116, 300), 256),
        *((1, 200, 130), (130, 36, 128), (130, 1, 128), (40, 24, 0)),
    ],
)
def test_a_product_is_added(m: int, n: int, tokens: int, backend: str) -> None:
    a, b, into = rows(m, tokens), rows(n, tokens), randn(m, n)
    exact = added(Exact.of(plain(a), plain(b)), into)
    gemm_add(a, b, into, backend=backend)
    assert exact.off(into, backend) <= 1


@pytest.mark.parametrize("backend", ["reference", *GROUPED_BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n", [size(4096, 200), 576])
def test_each_expert_multiplies_its_rows(
    n: int, split: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    groups = Groups.of(split, DEVICE)
    k = size(7168, 256)
    a, b = grouped_rows(k, groups), blocks(len(split), n, k)
    y = grouped_gemm(a, b, groups, dtype=dtype, backend=backend)
    assert y.shape == (groups.padded, n)
    x, w = plain(a), plain(b)
    for e, (first, last) in enumerate(zip(groups.starts.tolist(), groups.starts.tolist()[1:], strict=False)):
        assert Exact.of(x[first:last], w[e]).off(y[first:last], backend) <= 1
        assert not y[first + split[e] : last].any()  # padding


@pytest.mark.parametrize("backend", ["reference", *GROUPED_BACKENDS])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("m", "n"), [(size(4096, 130), size(7168, 72)), (64, 144)])
def test_each_expert_adds_its_own(m: int, n: int, split: tuple[int, ...], backend: str) -> None:
    groups = Groups.of(split, DEVICE)
    a, b, into = grouped_columns(m, groups), grouped_columns(n, groups), randn(len(split), m, n)
    before = into.clone()
    grouped_gemm_add(a, b, groups, into, backend=backend)
    x, y = plain(a), plain(b)
    for e, (first, last) in enumerate(zip(groups.starts.tolist(), groups.starts.tolist()[1:], strict=False)):
        if first == last:
            assert same_bits(into[e], before[e])
        exact = added(Exact.of(x[:, first:last], y[:, first:last]), before[e])
        assert exact.off(into[e], backend) <= 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_what_is_no_number_shows(backend: str) -> None:
    """A NaN spoils its row, an Inf everything its tile takes part in, and nothing else is touched."""
    x, w = randn(4, 384), randn(300, 384)
    x[1, 130], x[2, 383], w[140, 5] = torch.nan, torch.inf, torch.inf
    a = quantise_rows(x, pow2=False, backend="reference")
    b = quantise_blocks(w, pow2=False, backend="reference")
    y = gemm(a, b, dtype=torch.float32, backend=backend)
    spoilt = torch.zeros(4, 300, dtype=torch.bool, device=DEVICE)
    spoilt[1:3], spoilt[:, 128:256] = True, True
    assert torch.equal(~torch.isfinite(y), spoilt)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", ["reference", *GROUPED_BACKENDS])
def test_an_experts_nan_stays_its_own(backend: str) -> None:
    groups = Groups.of((128, 256, 128), DEVICE)
    a, b = randn(70, groups.padded), randn(40, groups.padded)
    a[3, 200], b[7, 300] = torch.nan, torch.inf
    into = torch.zeros(3, 70, 40, device=DEVICE)
    spoilt = torch.zeros_like(into, dtype=torch.bool)
    spoilt[1, 3], spoilt[1, :, 7] = True, True
    one, two = (quantise_rows(x, pow2=False, backend="reference") for x in (a, b))
    grouped_gemm_add(one, two, groups, into, backend=backend)
    assert torch.equal(~torch.isfinite(into), spoilt)


@pytest.mark.parametrize("backend", GROUPED_BACKENDS)
def test_fewer_multiprocessors_change_no_bit(backend: str) -> None:
    groups = Groups.of((130, 0, 300), DEVICE)
    a, b, dy = grouped_rows(256, groups), blocks(3, 200, 256), grouped_columns(130, groups)
    ys, sums = [], []
    for sms in (0, 1, 2):
        ys.append(grouped_gemm(a, b, groups, dtype=torch.float32, backend=backend, sms=sms))
        into = torch.ones(3, 130, 130, device=DEVICE)
        grouped_gemm_add(dy, dy, groups, into, backend=backend, sms=sms)
        sums.append(into)
    assert all(same_bits(one, ys[0]) for one in ys)
    assert all(same_bits(one, sums[0]) for one in sums)


@pytest.mark.parametrize("k", [512, 4096])
def test_what_14_bits_lose(k: int) -> None:
    """Positive numbers, so that cut-off bits add up. A cut loses less than 2^-13, about 2^-14 at a time: promoted,
    five times in a tile whatever K; unpromoted, once for each 32 of K, half of that in the mean since sums grow."""
    a = quantise_rows(torch.rand(64, k, device=DEVICE), pow2=False, backend="reference")
    b = quantise_blocks(torch.rand(128, k, device=DEVICE), pow2=False, backend="reference")
    exact = Exact.of(plain(a), plain(b))
    steps = k // 32

    def lost(accumulate: str) -> tuple[float, float]:
        y = gemm(a, b, dtype=torch.float32, backend="reference", accumulate=accumulate)
        return error(y, exact.product), float(((exact.product - y.double()) / exact.magnitude).max())

    assert lost("promoted")[0] < 2.0**-20
    norm, most = lost("hopper")
    assert 2.0**-15 < norm < 2.0**-12
    assert most < 5 * 2.0**-13
    norm, most = lost("unpromoted")
    assert steps / 2 * 2.0**-15 < norm < steps / 2 * 2.0**-13
    assert most < (steps + 1) * 2.0**-13


@pytest.mark.skipif(not ON_GPU, reason="tensor cores lose bits, an interpreter does not")
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_cores_lose_what_the_emulation_says(backend: str) -> None:
    """Far less than the limit of the worst case, and no growth with K."""
    a, b = rows(512, 16384), blocks(512, 16384)
    exact = Exact.of(plain(a), plain(b)).product
    emulated = gemm(a, b, dtype=torch.float32, backend="reference", accumulate="hopper")
    found = gemm(a, b, dtype=torch.float32, backend=backend)
    assert error(found, exact) < 4 * error(emulated, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_reference_emulates(backend: str) -> None:
    with pytest.raises(BackendUnavailable, match="reference"):
        gemm(rows(4, 128), blocks(8, 128), dtype=torch.float32, backend=backend, accumulate="hopper")


def test_operands_that_do_not_fit_are_refused() -> None:
    a, groups = rows(4, 128), Groups.of((3, 1), DEVICE)
    with pytest.raises(ValueError, match="contraction"):
        gemm(a, blocks(8, 256), dtype=torch.float32, backend="reference")
    with pytest.raises(ValueError, match="FP32"):
        gemm_add(a, rows(8, 128), torch.zeros(4, 8, device=DEVICE).bfloat16(), backend="reference")
    with pytest.raises(ValueError, match=r"FP32 \[4, 8\]"):
        gemm_add(a, rows(8, 128), torch.zeros(8, 4, device=DEVICE), backend="reference")
    with pytest.raises(ValueError, match="groups"):
        grouped_gemm(a, blocks(2, 8, 128), groups, dtype=torch.float32, backend="reference")
    with pytest.raises(ValueError, match="groups"):
        grouped_gemm_add(a, a, groups, torch.zeros(2, 4, 4, device=DEVICE), backend="reference")


@pytest.mark.skipif(find_spec("deep_gemm") is not None, reason="here it is installed")
def test_deep_gemm_says_that_it_is_missing() -> None:
    with pytest.raises(BackendUnavailable, match="DeepGEMM"):
        gemm(rows(4, 128), blocks(128, 128), dtype=torch.bfloat16, backend="ext")
