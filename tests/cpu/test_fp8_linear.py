"""FP8 linears against plain products of what their operands hold, in FP64; and against unrounded ones.

Legend: M rows, K inputs, N outputs.
"""

import pytest
import torch
from torch import Tensor

from deepseek_train.config.schema import TilesConfig
from deepseek_train.fp8.linear import fp8_linear, fp8_linears
from deepseek_train.fp8.room import Fp8
from deepseek_train.model.linear import linear
from deepseek_train.phases.wgrad import Weight, WeightGradQueue, run_works
from tests.helpers.fp8 import COARSE, FP32, apart, coarse, numbers, product_slack, room, slack, weight

SHAPES = [(1, 128, 128), (130, 72, 40), (256, 200, 300), (7, 5, 3)]
every_shape = pytest.mark.parametrize(("m", "k", "n"), SHAPES)


def bound(a: Tensor, b: Tensor) -> Tensor:
    """Of FP32 sums of products of FP32 numbers: a rounding for each term and each partial sum."""
    return (2 * a.shape[1] + 8) * FP32 * (a.abs() @ b.abs().t())


def operands(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Weight, Tensor]:
    x = (torch.randn(m, k) * torch.logspace(-3, 1, m).unsqueeze(1)).to(dtype).requires_grad_()
    return x, weight(n, k, dtype=dtype), (torch.randn(m, n) * 1e-5).to(dtype)


RECIPES = [{}, *(coarse(tile) for tile in COARSE), {"weights": TilesConfig("tensor", "pow2")}]


@every_shape
@pytest.mark.parametrize("recipe", RECIPES, ids=["v3", *COARSE, "one scale a weight"])
def test_all_three_products_are_those_of_their_operands(
    m: int, k: int, n: int, recipe: dict[str, TilesConfig]
) -> None:
    fp8, (x, w, dy) = room(**recipe), operands(m, k, n)
    y = fp8_linear(x, w, fp8)
    y.backward(dy)
    run_works(fp8.queue.take_open())
    rules = fp8.recipe
    x_q, w_q = numbers(rules.inputs.rounding.rows(x.detach())), numbers(rules.weights.blocks(w.detach()))
    assert ((y - x_q @ w_q.t()).abs() <= bound(x_q, w_q)).all()
    dy_q = numbers(rules.gradients.rows(dy))
    assert x.grad is not None
    assert ((x.grad - dy_q @ w_q).abs() <= bound(dy_q, w_q.t())).all()
    dy_t = numbers(rules.weight_gradients.columns(dy))
    x_t = numbers(rules.weight_gradients.columns(x_q.float()))  # from the FP8 numbers that were kept
    assert ((w.main_grad - dy_t @ x_t.t()).abs() <= bound(dy_t, x_t)).all()


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_the_product_that_is_not_rounded(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    fp8, (x, w, dy) = room(), operands(m, k, n, dtype)
    y = fp8_linear(x, w, fp8)
    assert y.dtype is dtype
    y.backward(dy)
    run_works(fp8.queue.take_open())
    x_w, w_w, dy_w = x.detach().double(), w.detach().double(), dy.double()
    assert x.grad is not None
    assert x.grad.dtype is dtype
    rounded = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-20

    def near(found: Tensor, wanted: Tensor, allowed: Tensor) -> bool:
        return bool(((found.double() - wanted).abs() <= allowed * 1.01 + wanted.abs() * rounded * 2).all())

    # Blocks of a weight have one scale for 128 rows: at most the largest anywhere.
    loose = slack(w_w).clamp(min=float(w_w.abs().amax()) / 448 / 512)
    forward = slack(x_w) @ w_w.abs().t() + x_w.abs() @ loose.t() + slack(x_w) @ loose.t()
    assert near(y, x_w @ w_w.t(), forward)
    backward = slack(dy_w) @ w_w.abs() + dy_w.abs() @ loose + slack(dy_w) @ loose
    assert near(x.grad, dy_w @ w_w, backward)
    # x is rounded twice: along K for the product, along M for the weight gradient.
    twice = x_w.abs() + slack(x_w)
    extra = (dy_w.abs() + slack(dy_w.t()).t()).t() @ slack(x_w)
    assert near(w.main_grad, dy_w.t() @ x_w, product_slack(dy_w.t(), twice.t()) + extra)
    if m * k * n > 10_000:  # and it is FP8, no more exact than that
        assert 0.01 < apart(y, x_w @ w_w.t()) < 0.06


def test_one_input_of_two_weights_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8, (x, w, dy) = room(), operands(130, 72, 40)
    v, dz = weight(24, 72), torch.randn(130, 24)
    calls = []
    keep = type(fp8.recipe.inputs).keep
    monkeypatch.setattr(type(fp8.recipe.inputs), "keep", lambda *a: calls.append(1) or keep(*a))
    y, z = fp8_linears(x, (w, v), fp8)
    torch.autograd.backward([y, z], [dy, dz])
    run_works(fp8.queue.take_open())
    assert len(calls) == 1
    assert x.grad is not None
    wanted = torch.zeros(130, 72)
    for one, product, gradient in ((w, y, dy), (v, z, dz)):
        alone, leaf = room(), x.detach().requires_grad_()
        expected, copy = one.main_grad, Weight(one.detach())
        copy.main_grad = torch.zeros_like(expected)
        assert torch.equal(product, fp8_linear(leaf, copy, alone))
        fp8_linear(leaf, copy, alone).backward(gradient)
        run_works(alone.queue.take_open())
        assert torch.equal(copy.main_grad, expected)
        assert leaf.grad is not None
        wanted += leaf.grad
    assert torch.equal(x.grad, wanted)


def test_input_and_weight_gradients_are_separate() -> None:
    fp8, (x, w, dy) = room(), operands(130, 72, 40)
    fp8_linear(x, w, fp8).backward(dy)
    assert x.grad is not None
    before = x.grad.clone()
    assert before.any()
    assert not w.main_grad.any()
    works = fp8.queue.take_open()
    x.data.fill_(torch.nan)  # nothing of the input itself is needed any more
    dy.fill_(torch.nan)
    run_works(works)
    assert w.main_grad.isfinite().all()
    assert w.main_grad.any()
    assert torch.equal(x.grad, before)
    assert w.grad is None


def test_gradients_of_micro_batches_add_up() -> None:
    fp8, (x, w, dy) = room(), operands(130, 72, 40)
    for _ in range(2):
        fp8_linear(x, w, fp8).backward(dy)
    first, second = fp8.queue.take_open()
    run_works([first])
    once = w.main_grad.clone()
    run_works([second])
    assert torch.equal(w.main_grad, 2 * once)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
@pytest.mark.parametrize("tile", ["1x128", *COARSE])
def test_what_is_not_finite_does_not_vanish(where: str, strange: float, tile: str) -> None:
    fp8, (x, w, dy) = room(**coarse(tile)), operands(130, 300, 140)
    with torch.no_grad():
        {"x": x, "w": w, "dy": dy}[where][100, 130] = strange
    y = fp8_linear(x, w, fp8)
    y.backward(dy)
    run_works(fp8.queue.take_open())
    assert x.grad is not None
    if where != "dy":
        assert not (y[100] if where == "x" else y[:, 100]).isfinite().any()
    if where != "w":
        line = w.main_grad[:, 130] if where == "x" else w.main_grad[130]
        assert not line.isfinite().any()
    if where != "x":
        assert not (x.grad[:, 130] if where == "w" else x.grad[100]).isfinite().any()


@pytest.mark.parametrize("tile", ["1x128", *COARSE])
def test_zeros_and_no_rows_at_all(tile: str) -> None:
    fp8, w = room(**coarse(tile)), weight(40, 72)
    for m in (0, 3):
        x = torch.zeros(m, 72, requires_grad=True)
        y = fp8_linear(x, w, fp8)
        assert y.shape == (m, 40)
        assert not y.any()
        y.backward(torch.zeros(m, 40))
        assert x.grad is not None
        assert not x.grad.any()
    run_works(fp8.queue.take_open())
    assert not w.main_grad.any()


@pytest.mark.parametrize("accumulate", ["hopper", "unpromoted"])
def test_the_recipe_says_how_products_are_added_up(accumulate: str) -> None:
    """14 bits in tensor cores cost some precision, and most of it where nothing is promoted."""
    x, w, _ = operands(4, 4096, 16)
    exact, found = fp8_linear(x, w, room()), fp8_linear(x, w, room(accumulate=accumulate))
    assert 1e-6 < apart(found, exact) < (1e-3 if accumulate == "hopper" else 1e-2)


def test_batches_of_sequences_have_their_shape() -> None:
    fp8: Fp8 = room()
    x, w = torch.randn(2, 5, 72, requires_grad=True), weight(40, 72)
    y = fp8_linear(x, w, fp8)
    assert y.shape == (2, 5, 40)
    assert torch.equal(y.flatten(0, 1), fp8_linear(x.flatten(0, 1), w, fp8))
    y.sum().backward()
    assert x.grad is not None
    wanted = x.detach().clone().requires_grad_()
    linear(wanted, w, WeightGradQueue()).sum().backward()
    assert wanted.grad is not None
    assert apart(x.grad, wanted.grad) < 0.06
