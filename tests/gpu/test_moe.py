"""Around the experts: rows move unchanged and are added in order, and the router's choice is the rule's, ties included.

Backends equal the reference bit for bit; the reference is held to plain loops and to float64.
"""

import pytest
import torch
from torch import Tensor

from deepseek_kernels.formats import Groups
from deepseek_kernels.moe import Order, expand, expand_rows, gate, gate_backward, order, reduce
from deepseek_kernels.quant import quantise_rows
from tests.gpu.setting import DEVICE, backends, error, randn, same_bits, size

ALL = backends("reference", "triton")
TORCHS = backends("reference", "triton", "torch")
ROWS, HIDDEN, TOP_K, LOCAL = size(16384, 90), size(7168, 1100), 8, 4
GATES = [
    *((256, 8, 4, 8), (64, 8, 4, 8), (16, 8, 4, 8), (256, 1, 1, 8)),
    *((60, 5, 2, 5), (12, 3, 2, 2), (10, 2, 2, 1), (6, 3, 2, 4)),
]


def drawn(rows: int, never: int = 2) -> tuple[Tensor, Order, Groups]:
    """Experts of the received rows (-1: of another rank), [R, K]; nobody chooses expert ``never``."""
    ids_RK = torch.rand(rows, 4 * LOCAL).argsort(-1)[:, :TOP_K]
    ids_RK = torch.where((ids_RK < LOCAL) & (ids_RK != never), ids_RK, -1)
    flat = ids_RK.flatten()
    slots = torch.cat([(flat == expert).nonzero().flatten() for expert in range(LOCAL)])
    rows_E = tuple(int((flat == expert).sum()) for expert in range(LOCAL))
    groups = Groups.of(rows_E, DEVICE)
    return ids_RK, order(slots.to(DEVICE), rows, TOP_K, groups), groups


@pytest.mark.parametrize("rows", [size(1000, 150), 1, 0])
def test_the_order_is_by_expert_and_padded(rows: int) -> None:
    ids_RK, ours, groups = drawn(rows)
    owner = groups.tile_expert.repeat_interleave(128).tolist()
    expected_rows, expected_places, at = [-1] * groups.padded, [[-1] * TOP_K for _ in range(rows)], 0
    assigned = []
    for expert in range(LOCAL):
        place = owner.index(expert) if expert in owner else 0
        for row, slot in (ids_RK == expert).nonzero().tolist():
            assert owner[place] == expert
            expected_rows[place], expected_places[row][slot] = row, place
            assigned.append(place)
            place, at = place + 1, at + 1
    assert ours.padded_to_row_P.tolist() == expected_rows
    assert ours.row_to_padded_RK.tolist() == expected_places
    assert ours.assignment_to_padded_A.tolist() == assigned
    assert at == sum(groups.rows_E)
    assert {ours.padded_to_row_P.dtype, ours.row_to_padded_RK.dtype} == {torch.int32}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "hidden"), [(ROWS, HIDDEN), (1, 128), (3, 77), (0, 64)])
def test_expand_takes_rows_as_they_are(rows: int, hidden: int, dtype: torch.dtype, backend: str) -> None:
    _, ours, _ = drawn(rows)
    x = randn(rows, hidden, dtype=dtype)
    x[: rows // 2, ::3] = torch.nan
    y = expand(x, ours.padded_to_row_P, backend=backend)
    index = ours.padded_to_row_P.long()
    with_zeros = torch.cat([x, x.new_zeros(1, hidden)])  # -1 is the last
    assert same_bits(y, with_zeros[index])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("pow2", [False, True])
def test_quantised_rows_expand_as_expanded_rows_quantise(pow2: bool, backend: str) -> None:
    _, ours, _ = drawn(ROWS)
    x = randn(ROWS, HIDDEN, dtype=torch.bfloat16, spread=2.0)
    x[0] = 0.0
    rows = quantise_rows(x, pow2=pow2, backend="reference")
    found = expand_rows(rows, ours.padded_to_row_P, pow2=pow2, backend=backend)
    expected = quantise_rows(
        expand(x, ours.padded_to_row_P, backend="reference"), pow2=pow2, backend="reference"
    )
    assert same_bits(found.values, expected.values)
    assert same_bits(found.scales, expected.scales)
    assert found.width == HIDDEN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "hidden"), [(ROWS, HIDDEN), (1, 128), (5, 77), (0, 64)])
def test_reduce_adds_in_fp32_and_rounds_once(rows: int, hidden: int, dtype: torch.dtype) -> None:
    _, ours, groups = drawn(rows)
    y = randn(groups.padded, hidden, dtype=dtype)
    y[ours.padded_to_row_P < 0] = torch.nan  # nobody's
    found = reduce(y, ours.row_to_padded_RK, backend="reference")
    for backend in backends("triton"):
        assert same_bits(reduce(y, ours.row_to_padded_RK, backend=backend), found)
    with_zeros = torch.cat([y, y.new_zeros(1, hidden)]).double()
    exact = magnitude = torch.zeros(rows, hidden, dtype=torch.float64, device=DEVICE)
    for index in ours.row_to_padded_RK.long().unbind(1):
        exact, magnitude = exact + with_zeros[index], magnitude + with_zeros[index].abs()
    once = exact.abs() * torch.finfo(dtype).eps / 2 * (dtype == torch.bfloat16)
    assert bool(((found.double() - exact).abs() <= 1.01 * once + TOP_K * 2.0**-24 * magnitude).all())


@pytest.mark.parametrize("backend", ALL)
def test_expand_and_reduce_are_each_others_backward(backend: str) -> None:
    """In small integers, whose sums are exact."""
    _, ours, groups = drawn(ROWS)
    x = torch.randint(-8, 9, (ROWS, 64), device=DEVICE).double().requires_grad_()
    dy = torch.randint(-8, 9, (groups.padded, 64), device=DEVICE).double()
    torch.cat([x, x.new_zeros(1, 64)])[ours.padded_to_row_P.long()].backward(dy)
    assert x.grad is not None
    assert same_bits(reduce(dy.bfloat16(), ours.row_to_padded_RK, backend=backend), x.grad.bfloat16())
    there = (ours.padded_to_row_P >= 0).unsqueeze(-1)
    y = (dy * there).requires_grad_()
    torch.cat([y, y.new_zeros(1, 64)])[ours.row_to_padded_RK.long()].sum(1).backward(x.detach())
    assert y.grad is not None
    assert same_bits(expand(x.detach().bfloat16(), ours.padded_to_row_P, backend=backend), y.grad.bfloat16())


@pytest.mark.parametrize("backend", ALL)
def test_a_nan_reaches_the_sums_it_is_part_of_and_no_other(backend: str) -> None:
    _, ours, groups = drawn(20)
    y = randn(groups.padded, 40, dtype=torch.bfloat16)
    place = int(ours.assignment_to_padded_A[0])
    y[place, 7] = torch.nan
    found = reduce(y, ours.row_to_padded_RK, backend=backend).isnan()
    assert found.nonzero().tolist() == [[int(ours.padded_to_row_P[place]), 7]]


def by_the_rule(biased: list[float], groups: int, kept: int, top_k: int) -> list[int]:
    each = len(biased) // groups
    members = [range(g * each, (g + 1) * each) for g in range(groups)]
    counts = [sum(sorted((biased[e] for e in group), reverse=True)[: top_k // kept]) for group in members]
    best = sorted(range(groups), key=lambda g: (-counts[g], g))[:kept]
    return sorted((e for g in best for e in members[g]), key=lambda e: (-biased[e], e))[:top_k]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), GATES)
def test_the_choice_is_the_rules(experts: int, groups: int, kept: int, top_k: int, backend: str) -> None:
    """Scores of 48 steps: ties everywhere, sums exact."""
    count = size(500, 21)
    scores = torch.randint(0, 49, (count, experts), device=DEVICE) / 64
    bias = torch.randint(-16, 17, (experts,), device=DEVICE) / 64
    ids, weights = gate(scores, bias, groups, kept, top_k, 2.5, backend=backend)
    assert ids.tolist() == [by_the_rule(row, groups, kept, top_k) for row in (scores + bias).tolist()]
    chosen = scores.double().gather(1, ids)
    exact = chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-20) * 2.5
    assert error(weights, exact) < 2.0**-22
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("count", [size(4096, 33), 1, 0])
@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), GATES)
def test_the_router_is_the_references(
    experts: int, groups: int, kept: int, top_k: int, count: int, backend: str
) -> None:
    scores, bias = randn(count, experts).sigmoid(), randn(experts) * 0.1
    scores[count // 2 : count // 2 + 2] = 0.0
    scores[count // 3 : count // 3 + 1] = 1e-22
    rule = groups, kept, top_k, 2.1
    expected = gate(scores, bias, *rule, backend="reference")
    found = gate(scores, bias, *rule, backend=backend)
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[1])
    d_weights = randn(count, top_k)
    back = [gate_backward(d_weights, scores, found[0], 2.1, backend=b) for b in ("reference", backend)]
    assert same_bits(back[1], back[0])


@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), GATES)
def test_torch_chooses_the_same_where_no_two_are_equal(
    experts: int, groups: int, kept: int, top_k: int
) -> None:
    rule = groups, kept, top_k, 2.1
    scores, bias = randn(40, experts).sigmoid(), randn(experts) * 0.1
    expected, found = (gate(scores, bias, *rule, backend=b) for b in ("reference", "torch"))
    assert torch.equal(found[0], expected[0])
    assert error(found[1], expected[1]) < 2.0**-22


@pytest.mark.parametrize("backend", TORCHS)
def test_the_gradient_is_that_of_the_formula(backend: str) -> None:
    scores, bias = randn(9, 60).sigmoid(), randn(60) * 0.1
    scores[3] = 1e-22  # the floor holds: a constant
    ids, _ = gate(scores, bias, 5, 2, 5, 2.1, backend=backend)
    d_weights = randn(9, 5)
    exact = scores.double().requires_grad_()
    chosen = exact.gather(1, ids)
    (chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-20) * 2.1).backward(d_weights.double())
    assert exact.grad is not None
    found = gate_backward(d_weights, scores, ids, 2.1, backend=backend)
    for row in ([3], [0, 1, 2, 4, 5, 6, 7, 8]):  # of quite different sizes
        assert error(found[row], exact.grad[row]) < 2.0**-20


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("backend", TORCHS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_not_hidden_and_not_out_of_range(wrong: float, backend: str) -> None:
    scores, bias = randn(9, 60).sigmoid(), randn(60) * 0.1
    scores[2] = wrong
    scores[4, 17] = wrong
    scores[6, 13:25] = wrong
    ids, weights = gate(scores, bias, 5, 2, 5, 2.5, backend=backend)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 60 for row in ids.tolist())
    clean = [0, 1, 3, 5, 7, 8]
    assert not weights[clean].isnan().any()
    touched = weights[[2, 4, 6]].isnan()
    if wrong != wrong:
        assert touched.all()
        assert not ids[4].eq(17).any()
    else:
        assert not weights[2].isfinite().any()
    if wrong == wrong and backend != "torch":  # torch takes any of equals
        expected = gate(scores, bias, 5, 2, 5, 2.5, backend="reference")
        assert same_bits(ids, expected[0])
        assert same_bits(weights, expected[1])


@pytest.mark.parametrize(
    ("groups", "kept", "top_k", "said"),
    [(7, 1, 1, "equal groups"), (5, 6, 8, "are kept"), (5, 2, 25, "to choose"), (5, 4, 3, "count nothing")],
)
def test_numbers_that_do_not_fit_are_refused(groups: int, kept: int, top_k: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gate(randn(2, 60), randn(60), groups, kept, top_k, 1.0, backend="reference")


@pytest.mark.parametrize("backend", TORCHS)
def test_ops_are_what_their_schemas_and_fakes_say(backend: str) -> None:
    ops = torch.ops.deepseek_kernels
    _, ours, groups = drawn(6)
    x, scores = randn(6, 128, dtype=torch.bfloat16), randn(4, 60).sigmoid()
    rows = quantise_rows(x, pow2=True, backend="reference")
    ids, weights = gate(scores, randn(60), 5, 2, 5, 2.5, backend="reference")
    both = "test_schema", "test_faketensor"
    for op, arguments, tests in (
        (ops.expand, (x, ours.padded_to_row_P), both),
        # The schema's test multiplies, which E4M3 cannot on a CPU.
        (ops.expand_rows, (rows.values, rows.scales, ours.padded_to_row_P, True), both[1:]),
        (ops.reduce, (randn(groups.padded, 128), ours.row_to_padded_RK), both),
        (ops.gate, (scores.t().contiguous().t(), randn(60), 5, 2, 5, 2.5), both),
        (ops.gate_backward, (weights, scores.t().contiguous().t(), ids, 2.5), both),
    ):
        torch.library.opcheck(op.default, arguments, {"backend": backend}, test_utils=tests)
