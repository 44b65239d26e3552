"""Attention: every backend against float64 autograd of the plain formula, each element within a bound that follows from
the roundings; what a query cannot see has no part in it, to the bit.

Legend: B batch, T and S time, H heads, Q query size, V value size.
"""

import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_kernels.attention import attention, attention_backward
from deepseek_kernels.machine import BackendUnavailable
from tests.gpu.setting import DEVICE, ON_GPU, randn, same_bits, size

BF16, FP32 = torch.bfloat16, torch.float32
V3 = (128, 64, 128)  # nope, rope, value
LONG = size(1100, 300)
# B, T, H, (nope, rope, value)
SHAPES = [(1, LONG, 2, V3), (2, 129, 1, V3), (2, 77, 2, (16, 8, 16)), (1, 50, 3, (24, 6, 40)), (2, 1, 1, V3)]


def starts(b: int, t: int, kind: str) -> Tensor | None:
    """ "edges": documents with borders on edges of blocks and beside them, two of length 1; "across": some that reach
    over several blocks; and borders at random. "none": no documents."""
    if kind == "none":
        return None
    rows = []
    for row in range(b):
        borders = {0, *torch.randint(0, t, (3 if kind == "edges" else row,)).tolist()}
        borders |= (
            {16 + row, 17 + row, 32, 63, 64, 128, 256 + row} if kind == "edges" else {20 + 3 * row, t - 7}
        )
        first = torch.zeros(t, dtype=torch.int32)
        for border in sorted(one for one in borders if 0 <= one < t):
            first[border:] = border
        rows.append(first)
    return torch.stack(rows).to(DEVICE)


def visible(t: int, document_starts_BT: Tensor | None) -> Tensor:
    """[B or 1, T, S]"""
    at = torch.arange(t, device=DEVICE)
    causal = (at[None, :] <= at[:, None])[None]
    return causal if document_starts_BT is None else causal & (at >= document_starts_BT[:, :, None])


class Exact:
    """The formula in float64, its gradients by autograd, and how far from them ``dtype`` may end.

    A sum of n terms, each rounded, errs by at most 6 sqrt(n) e of the sum of their magnitudes (Higham and Mary 2019,
    with odds of failure of 1e-7). e is 2^-24; tensor cores truncate, and an FP32 product in three of TF32 is good to
    2^-22. BF16 operands of products (P, dS) and results are rounded to 2^-8. First order throughout.
    ``loose``: torch on a CPU in BF16, which has a short polynomial for exp and adds gradients up in BF16, block of 32
    after block.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d_out: Tensor,
        scale: float,
        document_starts: Tensor | None,
        loose: bool = False,
    ) -> None:
        dtype, t = q.dtype, q.shape[1]
        e = 2.0**-22 if ON_GPU else 2.0**-24
        u = 2.0**-8 if dtype == BF16 else e
        of_exp, of_sum = (2.0**-13, u * (t // 32 + 1)) if loose else (2.0**-22, u)

        def summed(n: int) -> float:
            return 6 * math.sqrt(n) * e

        q, k, v, d_out = (x.double().transpose(1, 2) for x in (q, k, v, d_out))
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        seen = visible(t, document_starts)[:, None]
        logits = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
        p = logits.softmax(-1)
        out, lse = p @ v, logits.logsumexp(-1)
        gradients = torch.autograd.grad(out, (q, k, v), d_out)
        with torch.no_grad():
            self.values = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
            of_logits = (q.abs() @ k.abs().mT).amax() * scale * summed(q.shape[3])
            of_lse = of_logits + summed(t) + of_exp + e * lse.abs().amax()
            of_p = of_logits + of_lse + of_exp  # relative
            d_abs = d_out.abs()
            out_bound = (of_p + u + summed(t)) * (p @ v.abs()) + u * out.abs()
            of_delta = ((out_bound + summed(v.shape[3]) * out.abs()) * d_abs).sum(-1, keepdim=True)
            of_dp = summed(v.shape[3]) * (d_abs @ v.abs().mT)
            difference = (d_out @ v.mT - (out * d_out).sum(-1, keepdim=True)).abs()
            ds_abs = p * difference
            of_ds = (of_p + u + summed(t)) * ds_abs + p * (of_dp + of_delta)
            bounds = (
                of_ds @ k.abs() * scale + of_sum * gradients[0].abs(),
                of_ds.mT @ q.abs() * scale + of_sum * gradients[1].abs(),
                (of_p + u + summed(t)) * (p.mT @ d_abs) + of_sum * gradients[2].abs(),
            )
        self.lse, self.lse_bound = lse.detach(), of_lse
        self.bounds = {"out": out_bound, **dict(zip(("dq", "dk", "dv"), bounds, strict=True))}

    def check(self, out: Tensor, lse: Tensor, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
        assert (lse.double() - self.lse).abs().amax() <= self.lse_bound
        found = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
        for name, x in found.items():
            excess = (x.double().transpose(1, 2) - self.values[name]).abs() / (self.bounds[name] + 1e-30)
            assert excess.amax() <= 1, f"{name}: {float(excess.amax())} bounds away"  # fails for NaN too


def inputs(b: int, t: int, h: int, widths: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, d_out as MLA has them: k_nope and v from one projection, so that v is a view with strides."""
    nope, rope, value = widths
    kv = randn(b, t, h, nope + value, dtype=dtype)
    k_rope = randn(b, t, 1, rope, dtype=dtype).expand(-1, -1, h, -1)
    k = torch.cat([kv[..., :nope], k_rope], -1)
    return randn(b, t, h, nope + rope, dtype=dtype), k, kv[..., nope:], randn(b, t, h, value, dtype=dtype)


def lacks(
    backend: str, t: int, dtype: torch.dtype, widths: tuple[int, int, int], starts: Tensor | None
) -> bool:
    odd = t == 1 or dtype != BF16 or any(w % 8 for w in (widths[0] + widths[1], widths[2]))
    return backend == "torch" and (starts is not None or (ON_GPU and odd))


@pytest.mark.parametrize("backend", ["reference", "triton", "torch"])
@pytest.mark.parametrize("documents", ["none", "edges", "across"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("b", "t", "h", "widths"), SHAPES)
def test_results_and_gradients(
    b: int,
    t: int,
    h: int,
    widths: tuple[int, int, int],
    dtype: torch.dtype,
    documents: str,
    backend: str,
) -> None:
    t = t if dtype == BF16 else min(t, size(t, 64))  # tiles of FP32 are smaller
    q, k, v, d_out = inputs(b, t, h, widths, dtype)
    document_starts = starts(b, t, documents)
    scale = (widths[0] + widths[1]) ** -0.5
    if lacks(backend, t, dtype, widths, document_starts):
        with pytest.raises(BackendUnavailable, match="triton"):
            attention(q, k, v, scale, document_starts, nope=widths[0], backend=backend)
        return
    out, lse = attention(q, k, v, scale, document_starts, nope=widths[0], backend=backend)
    gradients = attention_backward(
        d_out, q, k, v, out, lse, scale, document_starts, nope=widths[0], backend=backend
    )
    assert out.dtype == dtype
    assert lse.dtype == FP32
    assert all(g.shape == x.shape and g.dtype == dtype for g, x in zip(gradients, (q, k, v), strict=True))
    loose = backend == "torch" and dtype == BF16 and not ON_GPU
    Exact(q, k, v, d_out, scale, document_starts, loose).check(out, lse, gradients)


def test_reference_is_exact_in_float64() -> None:
    q, k, v, d_out = (x.double() for x in inputs(2, 40, 2, (16, 8, 16), FP32))
    document_starts = starts(2, 40, "edges")
    out, lse = attention(q, k, v, 0.2, document_starts, nope=16, backend="reference")
    found = attention_backward(d_out, q, k, v, out, lse, 0.2, document_starts, nope=16, backend="reference")
    exact = Exact(q, k, v, d_out, 0.2, document_starts)
    torch.testing.assert_close(lse, exact.lse)
    for x, name in zip((out, *found), ("out", "dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(x.transpose(1, 2), exact.values[name])


@pytest.mark.parametrize(
    ("backend", "documents"),
    [
        ("reference", "none"),
        ("reference", "across"),
        ("triton", "none"),
        ("triton", "across"),
        ("torch", "none"),
    ],
)
@pytest.mark.parametrize("at", [0, 40, 130])
def test_a_nan_in_a_key_reaches_those_who_see_it(at: int, documents: str, backend: str) -> None:
    q, k, v, _ = inputs(2, 150, 2, V3, BF16)
    document_starts = starts(2, 150, documents)
    k[1, at, 0, 150] = torch.nan
    out, lse = attention(q, k, v, 0.07, document_starts, nope=128, backend=backend)
    expected = torch.zeros(2, 2, 150, dtype=torch.bool, device=DEVICE)
    expected[1, 0] = visible(150, document_starts).expand(2, -1, -1)[1, :, at]
    assert torch.equal(lse.isnan(), expected)
    assert torch.equal(out.isnan().any(-1), expected.transpose(1, 2))
    assert torch.equal(out.isnan().all(-1), expected.transpose(1, 2))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("dtype", "first", "last"), [(BF16, 30, 99), (BF16, 128, 140), (FP32, 30, 31)])
def test_other_documents_have_no_influence(dtype: torch.dtype, first: int, last: int, backend: str) -> None:
    t = last + 10
    document_starts = torch.zeros(1, t, dtype=torch.int32, device=DEVICE)
    document_starts[:, first:], document_starts[:, last:] = first, last
    ours = inputs(1, t, 2, V3, dtype)
    our_own = document_starts[..., None, None] == first
    other = tuple(torch.where(our_own, x, 3 * randn(*x.shape, dtype=dtype)) for x in ours)
    results = []
    for q, k, v, d_out in (ours, other):
        out, lse = attention(q, k, v, 0.07, document_starts, nope=128, backend=backend)
        gradients = attention_backward(
            d_out, q, k, v, out, lse, 0.07, document_starts, nope=128, backend=backend
        )
        results.append([x[:, first:last] for x in (out, lse.transpose(1, 2), *gradients)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert not same_bits(ours[1], other[1])


def test_strides_and_addresses_do_not_matter() -> None:
    """An address not aligned to 16 bytes, heads before time, a gradient expanded from one number."""
    q, k, v, _ = inputs(2, 70, 2, (24, 8, 24), BF16)
    d_out = randn(1, 1, 1, 1, dtype=BF16).expand(2, 70, 2, 24)
    document_starts = starts(2, 70, "edges")

    def results(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
        out, lse = attention(q, k, v, 0.2, document_starts, nope=24, backend="triton")
        again = attention_backward(d_out, q, k, v, out, lse, 0.2, document_starts, nope=24, backend="triton")
        return [out, lse, *again]

    expected = results(q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous())
    shifted = torch.cat([k.flatten(), k.new_zeros(1)]).roll(1)[1:].view(k.shape)  # an odd address
    assert shifted.data_ptr() % 16
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = results(turned, shifted, v, d_out)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton", "torch"])
@pytest.mark.parametrize(("b", "t"), [(0, 5), (1, 0)])
def test_nothing_gives_nothing(b: int, t: int, backend: str) -> None:
    q, k, v, d_out = inputs(b, t, 2, (16, 8, 16), BF16)
    out, lse = attention(q, k, v, 0.2, None, nope=16, backend=backend)
    gradients = attention_backward(d_out, q, k, v, out, lse, 0.2, None, nope=16, backend=backend)
    assert out.shape == v.shape
    assert lse.shape == (b, 2, t)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, d_out = inputs(1, 4, 1, (16, 8, 16), BF16)
    for arguments, nope in (
        ((q, k[:, :3], v, 0.2, None), 16),
        ((q, k, v[:, :3], 0.2, None), 16),
        ((q, k, v, 0.0, None), 16),
        ((q, k, v, 0.2, None), 24),
        ((q, k, v.float(), 0.2, None), 16),
        ((q, k, v, 0.2, torch.zeros(1, 4, device=DEVICE)), 16),
    ):
        with pytest.raises(ValueError):
            attention(*arguments, nope=nope, backend="reference")
    with pytest.raises(ValueError, match="d_out"):
        attention_backward(d_out[:, :3], q, k, v, v, q[..., 0], 0.2, None, nope=16, backend="reference")


def test_the_fake_has_the_shapes_of_the_real() -> None:
    real = inputs(2, 4, 3, (16, 8, 16), BF16)
    out, lse = attention(*real[:3], 0.2, None, nope=16, backend="reference")
    gradients = attention_backward(real[3], *real[:3], out, lse, 0.2, None, nope=16, backend="reference")
    with FakeTensorMode() as mode:
        q, k, v, d_out = (mode.from_tensor(x) for x in real)
        fake_out, fake_lse = attention(q, k, v, 0.2, None, nope=16, backend="triton")
        fakes = attention_backward(d_out, q, k, v, fake_out, fake_lse, 0.2, None, nope=16, backend="triton")
    for fake, one in zip((fake_out, fake_lse, *fakes), (out, lse, *gradients), strict=True):
        assert (fake.shape, fake.dtype) == (one.shape, one.dtype)


def test_ext_without_its_package_says_so() -> None:
    q, k, v, _ = inputs(1, 4, 1, (16, 8, 16), BF16)
    if find_spec("flash_attn") is None:
        with pytest.raises(BackendUnavailable, match="flash-attn-4"):
            attention(q, k, v, 0.2, None, nope=16, backend="ext")
    else:
        assert (
            attention(*inputs(1, 256, 2, V3, BF16)[:3], 0.07, None, nope=128, backend="ext")[0]
            .isfinite()
            .all()
        )
