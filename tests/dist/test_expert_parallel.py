"""Dispatch and combine against a loop over tokens and their experts, forward and backward, in FP64.

Legend: N local tokens, K experts per token, P expert-parallel ranks, R received rows, A assignments, D hidden,
E experts.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.parallel.exchange import ExpertGroup, SplitMismatch
from deepseek_train.parallel.expert.flat import Dispatched, expand, pack, reduce, route, unpack
from deepseek_train.parallel.expert.plan import DispatchPlan, make_plan
from deepseek_train.phases.parcel import Parcel
from deepseek_train.phases.phase import Move, Phase
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.wgrad import allocate_main_grads
from deepseek_train.schedule.overlap import Role
from tests.dist.grid import Case, on_grid, sum_gradients
from tests.harness import run_ranks

E, D = 8, 5
SIZES = (1, 2, 4)


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens, their routing, and the gradient that comes back for their results."""

    x_ND: Tensor
    ids_NK: Tensor
    weights_NK: Tensor
    dy_ND: Tensor


@dataclass(frozen=True)
class Scenario:
    """Tokens of every rank, and the experts: y = tanh(x M_e), M [E, D, D]."""

    name: str
    tokens_P: list[Tokens]
    experts_EDD: Tensor


def scenario(name: str, size: int) -> Scenario:
    """Fresh random tokens for ``size`` ranks. All scenarios have other numbers of tokens on each rank."""
    counts, allowed, top_k = [3 + 2 * rank for rank in range(size)], list(range(E)), 3
    match name:
        case "one rank without tokens":
            counts[size // 2] = 0
        case "no tokens at all":
            counts = [0] * size
        case "all tokens to one expert":
            allowed, top_k = [E - 1], 1
        case "experts and ranks without tokens":  # the first half of the experts, of them every other one
            allowed, top_k = [0, 2], 2
    tokens = []
    for count in counts:
        ids = [torch.tensor(allowed)[torch.randperm(len(allowed))[:top_k]] for _ in range(count)]
        ids_NK = torch.stack(ids) if ids else torch.zeros(0, top_k, dtype=torch.int64)
        random = (torch.randn(count, n, dtype=torch.float64) for n in (D, top_k, D))
        x_ND, weights_NK, dy_ND = random
        tokens.append(Tokens(x_ND, ids_NK, weights_NK, dy_ND))
    return Scenario(name, tokens, torch.randn(E, D, D, dtype=torch.float64))


NAMES = (
    "routed at random",
    "one rank without tokens",
    "no tokens at all",
    "all tokens to one expert",
    "experts and ranks without tokens",
)


@dataclass(frozen=True)
class Result:
    y_ND: Tensor
    dx_ND: Tensor
    d_weights_NK: Tensor
    d_experts: Tensor  # of this rank's experts
    x_RD: Tensor
    plan: DispatchPlan


def run_scenarios(rank: int, size: int, scenarios: list[Scenario]) -> list[Result]:
    group = ExpertGroup(dist.group.WORLD if size > 1 else None, rank, size, check_splits=True)
    return [run_scenario(one.tokens_P[rank], one.experts_EDD, group) for one in scenarios]


def run_scenario(tokens: Tokens, experts_EDD: Tensor, group: ExpertGroup) -> Result:
    """The phases of a block, without the block."""
    mine = experts_EDD.chunk(group.size)[group.rank].clone().requires_grad_()
    plan = make_plan(tokens.ids_NK, E, group)
    way = route(plan, group)
    arrived_RD = []

    def compute(sent: Parcel) -> Parcel:
        x_RD, weights_RK = sent.moves
        arrived_RD.append(x_RD.detach())
        x_AD, weights_A = expand(Dispatched(x_RD, weights_RK, plan))
        rows = zip(torch.split(x_AD, list(plan.rows_E)), mine, strict=True)
        y_AD = torch.cat([torch.tanh(x @ expert) for x, expert in rows]) * weights_A.unsqueeze(-1)
        return Parcel(None, (reduce(y_AD, plan),), way.back())

    tape = Tape()
    value = tuple(t.clone().requires_grad_() for t in (tokens.x_ND, tokens.weights_NK))
    for phase in (
        Phase("pack", Role.DISPATCH, lambda v: Parcel(None, pack(*v, plan, group), way)),
        Move("dispatch", Role.DISPATCH),
        Phase("experts", Role.EXPERTS, compute),
        Move("combine", Role.COMBINE),
        Phase("unpack", Role.COMBINE, lambda p: unpack(*p.moves, plan, group)),
    ):
        value = tape.run(phase, value)
    tape.seed([tokens.dy_ND])
    while len(tape):
        tape.backward()
    dx_ND, d_weights_NK = tape.gradients()
    assert dx_ND is not None
    assert d_weights_NK is not None
    assert mine.grad is not None
    return Result(value.detach(), dx_ND, d_weights_NK, mine.grad, arrived_RD[0], plan)


def by_the_token(one: Scenario) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """What should come out: results, input and routing-weight gradients of each rank, gradients of all experts."""
    experts = one.experts_EDD.clone().requires_grad_()
    xs = [t.x_ND.clone().requires_grad_() for t in one.tokens_P]
    weights = [t.weights_NK.clone().requires_grad_() for t in one.tokens_P]
    ys = []
    for t, x_ND, weights_NK in zip(one.tokens_P, xs, weights, strict=True):
        y_N = [
            sum(w * torch.tanh(x @ experts[e]) for w, e in zip(w_K, ids_K.tolist(), strict=True))
            for x, w_K, ids_K in zip(x_ND, weights_NK, t.ids_NK, strict=True)
        ]
        ys.append(torch.stack(y_N) if y_N else x_ND * 0.0)
    products = [(y * t.dy_ND).sum() for y, t in zip(ys, one.tokens_P, strict=True)]
    inputs = [experts, *xs, *weights]
    grads = torch.autograd.grad(torch.stack(products).sum(), inputs, allow_unused=True)
    filled = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]
    size = len(xs)
    return [y.detach() for y in ys], filled[1 : 1 + size], filled[1 + size :], filled[0]


def near(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool(
        ((found - wanted).abs() <= 1e-12 * (1.0 + wanted.abs())).all()
    )


@pytest.mark.parametrize("size", SIZES)
def test_dispatch_and_combine_serve_every_token(size: int) -> None:
    scenarios = [scenario(name, size) for name in NAMES]
    results = run_ranks(run_scenarios, size, scenarios)
    for one, *ranks in zip(scenarios, *results, strict=True):
        ys, dxs, d_weights, d_experts = by_the_token(one)
        for rank, found in enumerate(ranks):
            where = f"{one.name}, rank {rank}"
            assert near(found.y_ND, ys[rank]), where
            assert near(found.dx_ND, dxs[rank]), where
            assert near(found.d_weights_NK, d_weights[rank]), where
            assert near(found.d_experts, d_experts.chunk(size)[rank]), where
            check_order(one, rank, size, found, where)


def check_order(one: Scenario, rank: int, size: int, found: Result, where: str) -> None:
    """Rows arrive by source rank, then source token, each token once; assignments stand by expert, then row."""
    first = rank * E // size
    here = range(first, first + E // size)
    arriving = [
        (source, token)
        for source, tokens in enumerate(one.tokens_P)
        for token, ids_K in enumerate(tokens.ids_NK.tolist())
        if size == 1 or any(e in here for e in ids_K)
    ]
    rows = [one.tokens_P[source].x_ND[token] for source, token in arriving]
    x_RD = torch.stack(rows) if rows else torch.zeros(0, D, dtype=torch.float64)
    assert torch.equal(found.x_RD, x_RD), where  # moved, not computed: the same bits
    plan = found.plan
    assert plan.receive_P == [sum(source == s for source, _ in arriving) for s in range(size)], where
    of_expert = [
        [row for row, (source, token) in enumerate(arriving) if e in one.tokens_P[source].ids_NK[token]]
        for e in here
    ]
    assert plan.rows_E == tuple(map(len, of_expert)), where
    assert plan.assignment_to_row_A.tolist() == [row for rows in of_expert for row in rows], where


def run_stages(rank: int, _world_size: int, cases: list[Case]) -> list[tuple[Tensor, dict[str, Tensor], int]]:
    found = []
    for case in cases:
        grid = on_grid(case, rank, torch.float64)
        allocate_main_grads([w for _, w, _ in grid.weights().values()], torch.float64)
        ran = grid.executor.run(grid.prepared(), grid.batch_of(), case.scales)
        losses = torch.stack([*ran.main.values(), *ran.mtp.values(), *ran.balance])
        found.append((losses, sum_gradients(grid), grid.mesh.expert_group.rank))
    return found


def test_a_stage_computes_the_same_on_any_number_of_expert_ranks() -> None:
    cases = [Case("1f1b", 1, dp=4, ep=ep, microbatches=1) for ep in (1, 2, 4)]
    for (alone, whole, _), *shared in run_ranks(run_stages, 4, cases):
        for case, (losses, gradients, ep_rank) in zip(cases[1:], shared, strict=True):
            assert ((losses - alone).abs() <= 1e-12).all()
            for name, gradient in gradients.items():
                wanted = whole[name].chunk(case.ep)[ep_rank] if ".experts." in name else whole[name]
                assert (gradient - wanted).abs().max() <= 1e-12 * whole[name].abs().max(), name


def send_too_many(rank: int, size: int) -> str:
    """Rank 0 believes it sends a row more to everyone (its plan is of another micro-batch, say)."""
    group = ExpertGroup(dist.group.WORLD, rank, size, check_splits=True)
    plan = make_plan(torch.tensor([[0, E - 1]] * 3), E, group)
    if rank == 0:
        plan = replace(
            plan,
            sent_to_token_S=torch.zeros(sum(plan.send_P) + size, dtype=torch.int64),
            send_P=[n + 1 for n in plan.send_P],
        )
    with pytest.raises(SplitMismatch) as caught:
        route(plan, group).start(pack(torch.randn(3, D), torch.randn(3, 2), plan, group))
    return str(caught.value)


def test_debug_mode_names_the_ranks_whose_splits_disagree() -> None:
    for rank, message in enumerate(run_ranks(send_too_many, 4)):
        expected = 3 if rank in (0, 3) else 0  # experts 0 and 7 live on the first and the last rank
        assert f"expert rank {rank} expects {expected} rows from expert rank 0" in message
        assert f"which sends {expected + 1}" in message
