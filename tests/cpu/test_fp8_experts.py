"""Feed-forward networks and experts in FP8 against loops over rows and experts in FP64, on the numbers that FP8 holds.

Legend: R received rows, K experts per token, E experts here, D hidden, F feed-forward size, P sorted padded rows.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_train.fp8.experts import fp8_experts
from deepseek_train.fp8.feed_forward import fp8_feed_forward
from deepseek_train.fp8.room import Fp8
from deepseek_train.fp8.sorting import Sorting
from deepseek_train.fp8.swiglu import swiglu_forward, swiglu_gradients
from deepseek_train.model.swiglu import swiglu
from deepseek_train.parallel.expert.plan import Arrivals, assign
from deepseek_train.phases.wgrad import Weight, run_works
from tests.helpers.fp8 import COARSE, apart, coarse, numbers, room, weight

D, F, E = 72, 40, 4
EXACT = 2e-3  # FP32 and FP64 may round a few numbers at a boundary to different neighbours


@dataclass(frozen=True)
class Rounded:
    """What a plain step knows: operands as FP8 holds them, FP64."""

    y: Tensor
    dx: Tensor
    d_weight: Tensor
    d_gate_up: Tensor
    d_down: Tensor


def plain(
    fp8: Fp8, x_q: Tensor, weight_M: Tensor, w1: Tensor, w2: Tensor, dy_q: Tensor, dy_t: Tensor
) -> Rounded:
    """One network, or one expert with all its rows in tiles of its own; ``x_q`` and ``dy_q`` are rounded already."""
    recipe = fp8.recipe
    w1_q, w2_q = (numbers(recipe.weights.blocks(w)) for w in (w1, w2))
    gate_up = x_q @ w1_q.t()
    y = numbers(recipe.activations.rows(_swiglu(gate_up, weight_M).float())) @ w2_q.t()
    kept = numbers(recipe.swiglu_inputs.rounding.rows(gate_up.float())).requires_grad_()
    factor = weight_M.double().requires_grad_()
    made = _swiglu(kept, factor)
    d_kept, d_weight = torch.autograd.grad(made, [kept, factor], dy_q @ w2_q)
    columns = recipe.weight_gradients.columns
    return Rounded(
        y,
        numbers(recipe.gradients.rows(d_kept.float())) @ w1_q,
        d_weight,
        numbers(columns(d_kept.float())) @ numbers(columns(x_q.float())).t(),
        dy_t @ numbers(columns(made.detach().float())).t(),
    )


def _swiglu(gate_up: Tensor, weight_M: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up * weight_M.double().unsqueeze(-1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("m", [1, 130])
def test_a_feed_forward_network(m: int, shared: bool) -> None:
    fp8, w1, w2 = room(), weight(2 * F, D), weight(D, F)
    x, dy = torch.randn(m, D, requires_grad=True), torch.randn(m, D) * 1e-5
    storage = fp8.recipe.expert_inputs if shared else fp8.recipe.inputs
    y = fp8_feed_forward(x, w1, w2, fp8, storage)
    y.backward(dy)
    run_works(fp8.queue.take_open())
    x_q, dy_q = numbers(storage.rounding.rows(x.detach())), numbers(fp8.recipe.gradients.rows(dy))
    dy_t = numbers(fp8.recipe.weight_gradients.columns(dy))
    wanted = plain(fp8, x_q, torch.ones(m), w1.detach(), w2.detach(), dy_q, dy_t)
    assert x.grad is not None
    for found, expected in (
        (y, wanted.y),
        (x.grad, wanted.dx),
        (w1.main_grad, wanted.d_gate_up),
        (w2.main_grad, wanted.d_down),
    ):
        assert apart(found, expected) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", ["fp8", "params"])
def test_near_a_network_that_is_not_rounded(kept: str, dtype: torch.dtype) -> None:
    fp8, w1, w2 = room(swiglu_inputs=kept), weight(2 * F, D, dtype=dtype), weight(D, F, dtype=dtype)
    x = torch.randn(130, D).to(dtype).requires_grad_()
    dy = torch.randn(130, D).to(dtype)
    y = fp8_feed_forward(x, w1, w2, fp8, fp8.recipe.inputs)
    y.backward(dy)
    assert not w1.main_grad.any()
    assert not w2.main_grad.any()
    run_works(fp8.queue.take_open())
    leaves = [t.detach().double().requires_grad_() for t in (x, w1, w2)]
    wanted = swiglu(leaves[0] @ leaves[1].t(), None, "reference") @ leaves[2].t()
    expected = torch.autograd.grad(wanted, leaves, dy.double())
    assert x.grad is not None
    # Each rounding to E4M3 is off by 2.6% (a uniform error of 2^-4 at most); at most seven lie behind a number.
    for found, one in zip((y, x.grad, w1.main_grad, w2.main_grad), (wanted, *expected), strict=True):
        assert 0.01 < apart(found, one) < 7**0.5 * 0.036


def routed(rows: int, top_k: int, ids: list[int], first: int = 0) -> tuple[Arrivals, Tensor]:
    """Rows with ``top_k`` different experts of ``ids`` each, of which ``first``..``first`` + E are here."""
    chosen = [torch.tensor(ids)[torch.randperm(len(ids))[:top_k]] for _ in range(rows)]
    ids_RK = torch.stack(chosen) if chosen else torch.zeros(0, top_k, dtype=torch.int64)
    rows_E = [int((ids_RK == first + e).sum()) for e in range(E)]
    return assign(ids_RK, torch.arange(rows), first, rows_E), ids_RK


CASES = {
    "every expert": (140, 2, [0, 1, 2, 3], 0),
    "experts elsewhere and experts without rows": (30, 3, [0, 1, 4, 6], 0),
    "one row": (1, 1, [3], 0),
    "more than a tile for one expert": (300, 1, [2], 0),
    "none of the rows' experts are here": (5, 2, [0, 1, 2], 4),
    "no rows": (0, 2, [0, 1], 0),
}


@pytest.mark.parametrize("recipe", [{}, *(coarse(t) for t in COARSE)], ids=["v3", *COARSE])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_experts(case: tuple[int, int, list[int], int], recipe: dict[str, Any]) -> None:
    rows, top_k, ids, first = case
    arrivals, ids_RK = routed(rows, top_k, ids, first)
    fp8, w1, w2 = room(**recipe), weight(E, 2 * F, D), weight(E, D, F)
    x, dy = torch.randn(rows, D, requires_grad=True), torch.randn(rows, D) * 1e-5
    weights = torch.rand(rows, top_k, requires_grad=True)
    sorting = Sorting.of(arrivals.assignment_to_slot_A, arrivals.rows_E, rows, top_k, "reference")
    y = fp8_experts(x, weights, sorting, w1, w2, fp8)
    y.backward(dy)
    assert not w1.main_grad.any()
    run_works(fp8.queue.take_open())
    assert x.grad is not None
    assert weights.grad is not None
    wanted = [torch.zeros_like(t, dtype=torch.float64) for t in (y, x, weights, w1, w2)]
    x_q = numbers(fp8.recipe.expert_inputs.rounding.rows(x.detach()))
    dy_q = numbers(fp8.recipe.expert_gradients.rows(dy))
    for e in range(E):
        here, slot = torch.nonzero(ids_RK == first + e, as_tuple=True)
        if len(here) == 0 or (recipe and arrivals.rows_E.count(0) < E - 1):
            continue  # coarse scales span experts: those cases hold where one has all rows
        dy_t = numbers(fp8.recipe.weight_gradients.columns(dy_q[here].float()))
        one = plain(
            fp8, x_q[here], weights.detach()[here, slot], w1.detach()[e], w2.detach()[e], dy_q[here], dy_t
        )
        wanted[0].index_add_(0, here, one.y)
        wanted[1].index_add_(0, here, one.dx)
        wanted[2][here, slot] = one.d_weight
        wanted[3][e], wanted[4][e] = one.d_gate_up, one.d_down
    found = (y, x.grad, weights.grad, w1.main_grad, w2.main_grad)
    assert all(t.isfinite().all() for t in found)
    if recipe and arrivals.rows_E.count(0) < E - 1:
        return
    for one, expected in zip(found, wanted, strict=True):
        assert one.shape == expected.shape
        if expected.any():
            assert apart(one, expected) < EXACT
        else:
            assert not one.any()


def test_sorting_there_and_back() -> None:
    arrivals, ids_RK = routed(37, 3, [0, 1, 2, 5])
    sorting = Sorting.of(arrivals.assignment_to_slot_A, arrivals.rows_E, 37, 3, "reference")
    assert sorting.groups.padded == 3 * 128
    numbered = torch.arange(37 * 3, dtype=torch.float32).view(37, 3) + 1
    local = ids_RK < E
    assert torch.equal(sorting.from_padded(sorting.to_padded(numbered)), numbered * local)
    for e, (start, count) in enumerate(zip(sorting.groups.starts.tolist(), arrivals.rows_E, strict=False)):
        part = sorting.order.padded_to_row_P[start : start + count]
        assert part.tolist() == torch.nonzero(ids_RK == e)[:, 0].tolist()  # by token, as they came
    assert int((sorting.order.padded_to_row_P >= 0).sum()) == int(local.sum())


@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_between_products(weighted: bool) -> None:
    """Against autograd in FP64, but for one rounding to FP8 at the end."""
    recipe = room().recipe
    gate_up, dy = torch.randn(150, 2 * F), torch.randn(150, F)
    factor = torch.rand(150) if weighted else None
    found = swiglu_gradients(gate_up, factor, dy, recipe, "reference")
    made = swiglu_forward(gate_up, factor, recipe, "reference")
    wide, ones = gate_up.double().requires_grad_(), (torch.ones(150) if factor is None else factor).double()
    ones.requires_grad_()
    y = _swiglu(wide, ones)
    d_wide, d_ones = torch.autograd.grad(y, [wide, ones], dy.double())
    for one, expected in (
        (numbers(made), y),
        (numbers(found.y_t).t(), y),
        (numbers(found.d_gate_up), d_wide),
        (numbers(found.d_gate_up_t).t(), d_wide),
    ):
        assert 0.01 < apart(one, expected) < 0.036
    if factor is None:
        assert found.d_weight_M is None
    else:
        assert found.d_weight_M is not None
        assert apart(found.d_weight_M, d_ones) < 1e-6


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_row_and_expert(strange: float) -> None:
    arrivals, ids_RK = routed(20, 1, [0, 1])
    fp8, w1, w2 = room(), weight(E, 2 * F, D), weight(E, D, F)
    x = torch.randn(20, D)
    x[7, 3] = strange
    x.requires_grad_()
    sorting = Sorting.of(arrivals.assignment_to_slot_A, arrivals.rows_E, 20, 1, "reference")
    y = fp8_experts(x, torch.ones(20, 1), sorting, w1, w2, fp8)
    assert not y[7].isfinite().any()
    assert y[torch.arange(20) != 7].isfinite().all()
    y.backward(torch.randn(20, D))
    run_works(fp8.queue.take_open())
    hit = int(ids_RK[7])
    assert not w1.main_grad[hit].isfinite().all()
    assert w1.main_grad[1 - hit].isfinite().all()


def test_what_waits_is_fp8() -> None:
    """Of an input its values and scales, of gate_up the same: nothing in a wider format."""
    fp8, w1, w2 = room(), weight(2 * F, D), weight(D, F)
    saved: list[Tensor] = []
    x = torch.randn(50, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_feed_forward(x, Weight(w1.detach()), Weight(w2.detach()), fp8, fp8.recipe.inputs)
    assert sorted(t.nbytes for t in saved) == [50 * 4, 50 * 4, 50 * 128, 50 * 128]
