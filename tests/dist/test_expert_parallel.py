"""Dispatch and combine against a loop over tokens and their experts, forward and backward, in FP64; the dispatchers
against one another, bit for bit.

Legend: N local tokens, K experts per token, P expert-parallel ranks, R received rows, A assignments, D hidden,
E experts.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.parallel.exchange import SplitMismatch
from deepseek_train.parallel.expert.announce import RoutingFault, TokenRouting
from deepseek_train.parallel.expert.dispatcher import Planned, combine, dispatch, flat, two_hop
from deepseek_train.parallel.expert.journey import Journey
from deepseek_train.parallel.expert.local import ByIndex, expand, reduce
from deepseek_train.parallel.expert.plan import Arrivals, DispatchPlan
from deepseek_train.phases.wgrad import allocate_main_grads
from tests.dist.expert_ranks import expert_group
from tests.dist.grid import Case, on_grid, sum_gradients
from tests.harness import run_ranks

E, D = 16, 5


@dataclass(frozen=True)
class Ranks:
    """So many ranks, so many of them on each node."""

    size: int
    node: int

    @property
    def dispatchers(self) -> tuple[str, ...]:
        return ("flat", "two_hop") if self.size > 1 else ("flat",)


SIZES = (Ranks(1, 1), Ranks(2, 2), Ranks(2, 1), Ranks(4, 2), Ranks(4, 4), Ranks(8, 2), Ranks(8, 4))


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

    @property
    def capacity(self) -> int:
        return max(len(t.ids_NK) for t in self.tokens_P)

    def to(self, dtype: torch.dtype) -> "Scenario":
        tokens = [
            Tokens(t.x_ND.to(dtype), t.ids_NK, t.weights_NK.to(dtype), t.dy_ND.to(dtype))
            for t in self.tokens_P
        ]
        return Scenario(self.name, tokens, self.experts_EDD.to(dtype))


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
    x_AD: Tensor
    arrivals: Arrivals


def run_scenarios(rank: int, size: int, ranks: Ranks, scenarios: list[Scenario]) -> dict[str, list[Result]]:
    group = expert_group(rank, size, ranks.node, check_splits=True)
    of = {"flat": flat, "two_hop": two_hop}
    return {name: [run_scenario(one, of[name](group)) for one in scenarios] for name in ranks.dispatchers}


def planned(tokens: Tokens, dispatcher: Planned, capacity: int) -> DispatchPlan:
    routing = TokenRouting(tokens.ids_NK, tokens.weights_NK)
    told, route = dispatcher.announce(routing, E, layer=7, capacity=capacity)
    return dispatcher.plan(*route.start((told,)).wait(), routing, E)


def run_scenario(one: Scenario, dispatcher: Planned) -> Result:
    """The phases of a block, without the block."""
    group = dispatcher.group
    tokens = one.tokens_P[group.rank]
    mine = one.experts_EDD.chunk(group.size)[group.rank].clone().requires_grad_()
    plan = planned(tokens, dispatcher, one.capacity)
    x_ND, weights_NK = (t.clone().requires_grad_() for t in (tokens.x_ND, tokens.weights_NK))
    dispatched = dispatch(x_ND, weights_NK, plan)
    copies = ByIndex(plan.arrivals)
    x_AD, weights_A = expand(dispatched, copies)
    rows = zip(torch.split(x_AD, list(plan.arrivals.rows_E)), mine, strict=True)
    y_AD = torch.cat([torch.tanh(x @ expert) for x, expert in rows]) * weights_A.unsqueeze(-1)
    y_ND = combine(reduce(y_AD, copies), plan)
    y_ND.backward(tokens.dy_ND)
    assert x_ND.grad is not None
    assert weights_NK.grad is not None
    assert mine.grad is not None
    return Result(y_ND.detach(), x_ND.grad, weights_NK.grad, mine.grad, x_AD.detach(), plan.arrivals)


def by_the_token(one: Scenario) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """A loop over all tokens and their experts; y, dx, d_weights of every rank, and d_experts of all."""
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


@pytest.mark.parametrize("ranks", SIZES, ids=str)
def test_dispatch_and_combine_serve_every_token(ranks: Ranks) -> None:
    scenarios = [scenario(name, ranks.size) for name in NAMES]
    results = run_ranks(run_scenarios, ranks.size, ranks, scenarios)
    for dispatcher in ranks.dispatchers:
        for one, *found_P in zip(scenarios, *(of[dispatcher] for of in results), strict=True):
            ys, dxs, d_weights, d_experts = by_the_token(one)
            for rank, found in enumerate(found_P):
                where = f"{dispatcher}, {one.name}, rank {rank}"
                assert near(found.y_ND, ys[rank]), where
                assert near(found.dx_ND, dxs[rank]), where
                assert near(found.d_weights_NK, d_weights[rank]), where
                assert near(found.d_experts, d_experts.chunk(ranks.size)[rank]), where
                check_order(one, rank, ranks.size, found, where)


def check_order(one: Scenario, rank: int, size: int, found: Result, where: str) -> None:
    """Assignments stand by expert, then source rank, then source token; rows were moved, not computed."""
    first = rank * E // size
    here = range(first, first + E // size)
    x_AD = [
        tokens.x_ND[token]
        for e in here
        for tokens in one.tokens_P
        for token, ids_K in enumerate(tokens.ids_NK.tolist())
        if e in ids_K
    ]
    wanted = torch.stack(x_AD) if x_AD else torch.zeros(0, D, dtype=torch.float64)
    assert torch.equal(found.x_AD, wanted), where
    of_expert = [sum(e in ids for t in one.tokens_P for ids in t.ids_NK.tolist()) for e in here]
    assert found.arrivals.rows_E == tuple(of_expert), where
    arriving = sum(any(e in ids for e in here) for t in one.tokens_P for ids in t.ids_NK.tolist())
    assert size == 1 or found.arrivals.num_rows == arriving, (
        where
    )  # a token once, however many experts it has here


@pytest.mark.parametrize("ranks", [r for r in SIZES if r.size > 2], ids=str)
def test_two_hops_give_the_bits_of_one(ranks: Ranks) -> None:
    """In FP32: sums are made in the same order, node by node."""
    scenarios = [scenario(name, ranks.size).to(torch.float32) for name in NAMES]
    for found in run_ranks(run_scenarios, ranks.size, ranks, scenarios):
        for one, other in zip(found["flat"], found["two_hop"], strict=True):
            for name in ("y_ND", "dx_ND", "d_weights_NK", "d_experts", "x_AD"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name


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
    nodes = ((1, None), (2, None), (4, None), (4, 2))
    cases = [Case("1f1b", 1, dp=4, ep=ep, microbatches=1, node=node) for ep, node in nodes]
    for (alone, whole, _), *shared in run_ranks(run_stages, 4, cases):
        for case, (losses, gradients, ep_rank) in zip(cases[1:], shared, strict=True):
            assert ((losses - alone).abs() <= 1e-12).all()
            for name, gradient in gradients.items():
                wanted = whole[name].chunk(case.ep)[ep_rank] if ".experts." in name else whole[name]
                assert (gradient - wanted).abs().max() <= 1e-12 * whole[name].abs().max(), name


def send_too_many(rank: int, size: int) -> str:
    """Rank 0 believes it sends a row more to everyone (its plan is of another micro-batch, say)."""
    dispatcher = flat(expert_group(rank, size, size, check_splits=True))
    tokens = Tokens(torch.randn(3, D), torch.tensor([[0, E - 1]] * 3), torch.randn(3, 2), torch.randn(3, D))
    route = planned(tokens, dispatcher, capacity=3).there
    assert isinstance(route, Journey)
    if rank == 0:
        (hop,) = route.hops
        more = torch.zeros(sum(hop.send) + size, dtype=torch.int64)
        route = replace(route, hops=(replace(hop, taken_S=more, send=[n + 1 for n in hop.send]),))
    with pytest.raises(SplitMismatch) as caught:
        route.start((tokens.x_ND, tokens.weights_NK)).wait()
    return str(caught.value)


def test_debug_mode_names_the_ranks_whose_splits_disagree() -> None:
    for rank, message in enumerate(run_ranks(send_too_many, 4)):
        expected = 3 if rank in (0, 3) else 0  # experts 0 and 15 live on the first and the last rank
        assert f"peer {rank} expects {expected} rows from peer 0" in message
        assert f"which sends {expected + 1}" in message


def decide_what_cannot_be(rank: int, size: int, node: int, dispatcher: str) -> list[str]:
    make = {"flat": flat, "two_hop": two_hop}[dispatcher](expert_group(rank, size, node))
    said = []
    for fault in ("nan", "inf", "too large", "negative", "another layer"):
        ids_NK, weights_NK, layer = torch.tensor([[0, 3], [5, 1]]), torch.rand(2, 2), 7
        if rank == 1:
            match fault:
                case "nan" | "inf":
                    weights_NK[1, 0] = float(fault)
                case "too large":
                    ids_NK[0, 1] = E
                case "negative":
                    ids_NK[1, 1] = -1
                case "another layer":
                    layer = 8
        routing = TokenRouting(ids_NK, weights_NK)
        told, route = make.announce(routing, E, layer)
        with pytest.raises(RoutingFault) as caught:
            make.plan(*route.start((told,)).wait(), routing, E)
        said.append(str(caught.value))
    dist.barrier()
    return said


@pytest.mark.parametrize(("node", "dispatcher"), [(4, "flat"), (2, "two_hop")])
def test_every_rank_is_told_what_the_router_of_one_has_done(node: int, dispatcher: str) -> None:
    for nan, inf, too_large, negative, another in run_ranks(decide_what_cannot_be, 4, node, dispatcher):
        assert nan == inf
        assert "layer 7, expert-parallel rank 1: router weights are not finite" in nan
        assert too_large == negative
        assert "layer 7, expert-parallel rank 1: expert ids are outside 0..15" in too_large
        assert "rank 0: layer 7, rank 1: layer 8" in another
