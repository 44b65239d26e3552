"""The functions with hand-written backwards, against plain autograd: exactly in FP64, to a derived bound in
BF16.

Legend: B sequences, T positions, H heads, R rope dimension.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from deepseek_train.model.attention import attend
from deepseek_train.model.embed import embed
from deepseek_train.model.head import cross_entropy
from deepseek_train.model.linear import grouped_linear, linear
from deepseek_train.model.norm import rms_norm
from deepseek_train.model.rope import frequencies, rotations, softmax_scale, turned
from deepseek_train.model.swiglu import swiglu
from deepseek_train.phases.wgrad import Weight, WeightGradQueue, run_works
from tests.helpers.models import YARN, tiny
from tests.paper.models import shipped

ROWS_E = (3, 0, 4, 0)  # experts without rows, the last one among them
Op = Callable[[dict[str, Any], WeightGradQueue], Tensor]


def norm_by_hand(t: dict[str, Tensor], _: WeightGradQueue) -> Tensor:
    return t["x"] * (t["x"].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * t["gain"]


def swiglu_by_hand(t: dict[str, Tensor], _: WeightGradQueue) -> Tensor:
    gate, up = t["x"].chunk(2, -1)
    y = functional.silu(gate) * up
    return y * t["rows"].unsqueeze(-1) if "rows" in t else y


def grouped_by_hand(t: dict[str, Tensor], _: WeightGradQueue) -> Tensor:
    return torch.cat(
        [part @ w.t() for part, w in zip(t["x"].split(ROWS_E), t["weight"].unbind(), strict=True)]
    )


TOKENS = torch.tensor([[1, 4, 1], [0, 1, 2]])
# name: (shapes of inputs, shapes of weights, the operation, the same in plain torch)
OPS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], Op, Op]] = {
    "rms_norm": (
        {"x": (2, 3, 8)},
        {"gain": (8,)},
        lambda t, q: rms_norm(t["x"], t["gain"], 1e-6, q, "reference"),
        norm_by_hand,
    ),
    "swiglu": ({"x": (2, 3, 8)}, {}, lambda t, q: swiglu(t["x"], None, "reference"), swiglu_by_hand),
    "swiglu, weighted": (
        {"x": (6, 8), "rows": (6,)},
        {},
        lambda t, q: swiglu(t["x"], t["rows"], "reference"),
        swiglu_by_hand,
    ),
    "swiglu, no rows": (
        {"x": (0, 8), "rows": (0,)},
        {},
        lambda t, q: swiglu(t["x"], t["rows"], "reference"),
        swiglu_by_hand,
    ),
    "linear": (
        {"x": (2, 3, 8)},
        {"weight": (5, 8)},
        lambda t, q: linear(t["x"], t["weight"], q),
        lambda t, q: functional.linear(t["x"], t["weight"]),
    ),
    "grouped_linear": (
        {"x": (7, 8)},
        {"weight": (4, 5, 8)},
        lambda t, q: grouped_linear(t["x"], t["weight"], ROWS_E, q),
        grouped_by_hand,
    ),
    "embed": (
        {},
        {"weight": (6, 8)},
        lambda t, q: embed(TOKENS, t["weight"], q),
        lambda t, q: t["weight"][TOKENS],
    ),
}


def inputs(name: str, dtype: torch.dtype, kept: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Weight]]:
    generator = torch.Generator().manual_seed(0)
    xs, ws, _, _ = OPS[name]
    x = {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in xs.items()}
    w = {n: Weight(torch.randn(s, generator=generator).to(dtype)) for n, s in ws.items()}
    for weight in w.values():
        weight.main_grad = torch.ones(weight.shape, dtype=kept)  # added to, not overwritten
    return x, w


def both_sides(name: str, dtype: torch.dtype, kept: torch.dtype) -> list[tuple[str, Tensor, Tensor]]:
    """(what, ours, plain autograd's in FP64) for the result and all gradients."""
    _, _, ours, plain = OPS[name]
    x, w = inputs(name, dtype, kept)
    queue = WeightGradQueue()
    y = ours({**x, **w}, queue)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = {n: t.detach().double().requires_grad_() for n, t in {**x, **w}.items()}
    expected = plain(exact, queue)
    expected.backward(dy.double())
    y.backward(dy)
    assert all((weight.main_grad == 1).all() for weight in w.values()), "weight gradients wait in the queue"
    run_works(queue.take_open())
    assert all(weight.grad is None for weight in w.values())
    found = [("result", y, expected)]
    found += [(n, t.grad, exact[n].grad) for n, t in x.items()]  # type: ignore[misc]
    found += [(n, t.main_grad - 1, exact[n].grad) for n, t in w.items()]  # type: ignore[misc]
    return found


@pytest.mark.parametrize("name", OPS)
def test_fp64_is_plain_autograd(name: str) -> None:
    for what, ours, expected in both_sides(name, torch.float64, torch.float64):
        assert ours.dtype == torch.float64
        assert torch.allclose(ours, expected, rtol=1e-13, atol=1e-13), what


@pytest.mark.parametrize("name", OPS)
def test_bf16_rounds_a_few_times_and_no_more(name: str) -> None:
    """Each result is rounded to 8 bits once or twice, factors before it as often; sums run in FP32. So a
    bound of eight roundings of the largest element, where a sum in BF16 or a wrong formula would be far
    outside."""
    for what, ours, expected in both_sides(name, torch.bfloat16, torch.float32):
        if expected.numel():
            assert (ours.double() - expected).abs().max() <= 8 * 2**-9 * expected.abs().max(), what


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_embedding_adds_up_the_gradients_of_repeated_tokens(dtype: torch.dtype, kept: torch.dtype) -> None:
    """The embedding has no differentiable input: inside a tape, its phase gets a gradient for its output
    alone."""
    _, weights = inputs("embed", dtype, kept)
    queue = WeightGradQueue()
    y = embed(TOKENS, weights["weight"], queue)
    assert y.requires_grad
    assert torch.equal(y, weights["weight"][TOKENS])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy)
    run_works(queue.take_open())
    expected = torch.ones(6, 8, dtype=kept)
    for token, row in zip(TOKENS.flatten().tolist(), dy.flatten(0, 1), strict=True):
        expected[token] += row
    assert torch.equal(weights["weight"].main_grad, expected)
    assert weights["weight"].grad is None


def test_weight_gradients_of_bf16_are_summed_in_fp32() -> None:
    """300 rows of 1: BF16 cannot count beyond 256."""
    weight = Weight(torch.ones(1, 1, dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(1, 1)
    queue = WeightGradQueue()
    for _ in range(2):
        x = torch.ones(300, 1, dtype=torch.bfloat16, requires_grad=True)
        linear(x, weight, queue).sum().backward()
    run_works(queue.take_open())
    assert weight.main_grad.item() == 600


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 3, 11, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(11, (2, 3), generator=generator)
    exact = logits.detach().double().requires_grad_()
    loss = cross_entropy(1 * logits, labels, "reference")  # in the memory of its logits
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = -exact.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).mean()
    loss.backward(torch.tensor(0.25, dtype=loss.dtype))
    expected.backward(torch.tensor(0.25, dtype=torch.float64))
    assert logits.grad is not None
    assert exact.grad is not None
    assert abs(loss.item() - expected.item()) < (1e-13 if dtype == torch.float64 else 1e-5)
    assert logits.grad.dtype == dtype
    assert (logits.grad - exact.grad).abs().max() < bound * exact.grad.abs().max()


@pytest.mark.parametrize("v_size", [8, 12, 16])
def test_attention_is_causal_softmax(v_size: int) -> None:
    """Forward and gradients, for values smaller than, as large as and larger than keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 7, 3, 12), (2, 7, 3, 12), (2, 7, 3, v_size)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    ours = attend(q, k, v, scale=0.3, nope=8, backend="torch")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("bhqk,bkhv->bqhv", scores.softmax(-1), v)
    assert torch.allclose(ours, expected, atol=1e-12)
    dy = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-12)


# ---- rope


def rotate(x_BTHR: Tensor, turns_TR2: Tensor) -> Tensor:
    """A copy, turned."""
    heads = x_BTHR.shape[2]
    return turned(1 * x_BTHR.flatten(-2), turns_TR2, heads, "torch").unflatten(-1, (heads, -1))


def test_rope_turns_pairs_as_complex_numbers() -> None:
    m = tiny(qk_rope_head_dim=8)
    x_BTHR = torch.randn(2, 50, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = rotate(x_BTHR, rotations(m, 50, torch.device("cpu")))
    for pair in range(4):
        for t in (0, 1, 17, 49):
            z = torch.view_as_complex(x_BTHR.unflatten(-1, (4, 2)))[:, t, :, pair]
            expected = z * complex(math.cos(t * 10000 ** (-pair / 4)), math.sin(t * 10000 ** (-pair / 4)))
            got = torch.view_as_complex(found.unflatten(-1, (4, 2)).contiguous())[:, t, :, pair]
            assert (got - expected).abs().max() < 1e-5  # angles are FP32: 49 radians * 2^-24


def test_rope_keeps_norms_and_depends_on_distance_only() -> None:
    m = tiny(qk_rope_head_dim=8)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 40, 1, 8)
    turns_TR2 = rotations(m, 40, torch.device("cpu"))
    q_turned, k_turned = rotate(q, turns_TR2), rotate(k, turns_TR2)
    assert torch.allclose(q_turned.norm(dim=-1), q.norm(dim=-1), rtol=1e-6)
    products_TT = torch.einsum("qd,kd->qk", q_turned[0, :, 0], k_turned[0, :, 0])
    for distance in (0, 3, 20):
        same = products_TT.diagonal(distance)
        assert torch.allclose(same, same[0].expand_as(same), atol=2e-5)
    assert not torch.allclose(products_TT.diagonal(0)[0], products_TT.diagonal(3)[0], atol=1e-2)


def test_rope_gradient_is_the_turn_back_and_other_channels_pass() -> None:
    turns_TR2 = rotations(tiny(qk_rope_head_dim=8), 5, torch.device("cpu")).double()
    x, dy = torch.randn(2, 1, 5, 2, 11, dtype=torch.float64)
    x.requires_grad_()
    y = turned(1 * x.flatten(-2), turns_TR2, 2, "torch").unflatten(-1, (2, 11))
    factors = torch.view_as_complex(turns_TR2)[:, None]
    pairs = torch.view_as_complex(x[..., 3:].contiguous().unflatten(-1, (4, 2)))
    plain = torch.cat([x[..., :3], torch.view_as_real(pairs * factors).flatten(-2)], -1)
    assert torch.allclose(y, plain, rtol=1e-13, atol=1e-13)
    found, expected = torch.autograd.grad(y, x, dy.clone()), torch.autograd.grad(plain, x, dy)
    assert torch.allclose(found[0], expected[0], rtol=1e-13, atol=1e-13)


def test_rope_of_bf16_is_computed_in_fp32() -> None:
    turns_TR2 = rotations(tiny(qk_rope_head_dim=8), 30, torch.device("cpu"))
    x = torch.randn(1, 30, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert rotate(x, turns_TR2).dtype == torch.bfloat16
    assert torch.equal(rotate(x, turns_TR2), rotate(x.float(), turns_TR2).bfloat16())


def test_yarn_of_v3() -> None:
    """s = 40 from 4096 tokens: slots up to 10 keep their frequency, from 23 on it is divided by 40 (V3_SPEC
    A.4)."""
    m = shipped("deepseek_v3")
    extended = replace(m, yarn=replace(m.yarn, factor=40.0))
    plain, yarn = frequencies(m), frequencies(extended)
    ratio = plain / yarn
    assert torch.equal(yarn[:11], plain[:11])
    assert torch.allclose(ratio[23:], torch.tensor(40.0))
    assert (ratio[11:23] > 1.0).all()
    assert (ratio[11:23] < 40.0).all()
    kept = plain * (1 - 5 / 13) + plain / 40 * (5 / 13)  # slot 15 is 5/13 of the way from 10 to 23
    assert yarn[15].item() == pytest.approx(kept[15].item(), rel=1e-6)
    assert softmax_scale(m) == pytest.approx(192**-0.5)
    assert softmax_scale(extended) == pytest.approx(192**-0.5 * 1.8739, rel=1e-4)


def test_yarn_scales_turns_by_the_ratio_of_its_two_mscales() -> None:
    m = tiny(yarn=YARN)
    ratio = (0.1 * math.log(4) + 1) / (0.1 * 0.7 * math.log(4) + 1)
    turns = torch.view_as_complex(rotations(m, 9, torch.device("cpu")))
    assert torch.allclose(turns.abs(), torch.tensor(ratio))
