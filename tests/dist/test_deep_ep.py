"""The dispatcher over DeepEP, on a double of the library, against ``flat``: the same bits, forward and backward.

Legend: N local tokens, K experts per token, A assignments, D hidden, E experts.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.model.block import MoeBlock
from deepseek_train.parallel.expert.announce import RoutingFault, TokenRouting
from deepseek_train.parallel.expert.deep_ep import DeepEp
from deepseek_train.parallel.expert.deep_ep_buffers import Buffers, make_buffers
from deepseek_train.parallel.expert.dispatcher import Dispatcher, combine, dispatch, flat
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.parallel.expert.journey import UNCHANGED, WireFormats
from deepseek_train.parallel.expert.local import ByIndex, expand, reduce
from deepseek_train.parallel.expert.plan import DispatchPlan
from deepseek_train.parallel.expert.wire import WireFormat
from deepseek_train.phases.parcel import Parcel, depart
from deepseek_train.phases.wgrad import allocate_main_grads
from tests.dist.expert_ranks import expert_group
from tests.dist.grid import BATCH, LENGTH, Case, on_grid, sum_gradients
from tests.harness import run_ranks
from tests.helpers.deep_ep_double import Buffer, ElasticBuffer, Misuse

E, D, K, MOST = 16, 256, 3, 12
FP8 = WireFormats(WireFormat.FP8, WireFormat.BF16)
GENERATIONS = (1, 2)


def buffers(
    generation: int, group: ExpertGroup, hidden: int = D, tokens: int = MOST, top_k: int = K
) -> Buffers:
    return make_buffers(
        group.backward[Among.ALL].group,
        hidden_size=hidden,
        tokens=tokens,
        experts_per_token=top_k,
        fp8=True,
        device=torch.device("cpu"),
        first=Buffer,
        second=ElasticBuffer if generation == 2 else None,
    )


@dataclass(frozen=True)
class Result:
    """Of one micro-batch."""

    x_AD: Tensor
    weights_A: Tensor
    rows_E: tuple[int, ...]
    num_rows: int
    y_ND: Tensor
    dx_ND: Tensor
    d_weights_NK: Tensor

    def same(self, other: "Result") -> list[str]:
        """Names of what differs."""
        tensors = ("x_AD", "weights_A", "y_ND", "dx_ND", "d_weights_NK")
        found = [name for name in tensors if not torch.equal(getattr(self, name), getattr(other, name))]
        return found + [n for n in ("rows_E", "num_rows") if getattr(self, n) != getattr(other, n)]


def routed(rank: int, size: int, microbatch: int) -> TokenRouting:
    """Another number of tokens on every rank, none on one of them; some experts are chosen by nobody."""
    generator = torch.Generator().manual_seed(100 * microbatch + rank)
    count = 0 if (rank + microbatch) % size == 1 else MOST - rank
    ids = [torch.randperm(E - 3, generator=generator)[:K] for _ in range(count)]
    ids_NK = torch.stack(ids) if ids else torch.zeros(0, K, dtype=torch.int64)
    return TokenRouting(ids_NK, torch.rand(count, K, generator=generator))


def planned(dispatcher: Dispatcher, routing: TokenRouting, layer: int) -> DispatchPlan:
    told, route = dispatcher.announce(routing, E, layer, capacity=MOST)
    (told,) = route.start((told,)).wait()
    return dispatcher.plan(told, routing, E)


def run_microbatches(dispatcher: Dispatcher) -> list[Result]:
    """Two of them on their way at once: both forwards, then both backwards."""
    group, forwards, results = dispatcher.group, [], []
    mine_ED = (
        torch.randn(E, D, generator=torch.Generator().manual_seed(7)).bfloat16().chunk(group.size)[group.rank]
    )
    for microbatch in range(2):
        routing = routed(group.rank, group.size, microbatch)
        plan = planned(dispatcher, routing, layer=3)
        generator = torch.Generator().manual_seed(50 + 10 * group.rank + microbatch)
        x_ND = torch.randn(plan.num_tokens, D, generator=generator).bfloat16().requires_grad_()
        weights_NK = routing.weights_NK.clone().requires_grad_()
        copies = ByIndex(plan.arrivals)
        x_AD, weights_A = expand(dispatch(x_ND, weights_NK, plan), copies)
        experts_AD = mine_ED.repeat_interleave(torch.tensor(plan.arrivals.rows_E), 0)
        y_AD = (torch.tanh(x_AD * experts_AD) * weights_A.unsqueeze(-1)).bfloat16()
        y_ND = combine(reduce(y_AD, copies), plan)
        dy_ND = torch.randn(plan.num_tokens, D, generator=generator).bfloat16()
        forwards.append((plan, x_ND, weights_NK, x_AD, weights_A, y_ND, dy_ND))
    for plan, x_ND, weights_NK, x_AD, weights_A, y_ND, dy_ND in forwards:
        y_ND.backward(dy_ND)
        assert x_ND.grad is not None
        assert weights_NK.grad is not None
        arrived = (x_AD.detach(), weights_A.detach(), plan.arrivals.rows_E, plan.arrivals.num_rows)
        results.append(Result(*arrived, y_ND.detach(), x_ND.grad, weights_NK.grad))
    return results


def compare(rank: int, size: int) -> list[str]:
    group, different = expert_group(rank, size, size), []
    for formats in (UNCHANGED, FP8):
        theirs = run_microbatches(flat(group, formats))
        assert all(len(r.x_AD) and r.x_AD.abs().sum() > 0 for r in theirs)
        assert any(len(r.dx_ND) and r.d_weights_NK.abs().sum() > 0 for r in theirs)
        for generation in GENERATIONS:
            ours = run_microbatches(DeepEp(buffers(generation, group), group, formats))
            for one, other in zip(ours, theirs, strict=True):
                different += [f"generation {generation}, {formats}: {name}" for name in one.same(other)]
    return different


@pytest.mark.parametrize("size", [2, 4])
def test_it_gives_the_bits_of_flat(size: int) -> None:
    assert run_ranks(compare, size) == [[]] * size


def train_on_grid(rank: int, case: Case, generation: int | None) -> dict[str, Tensor]:
    """Losses and gradients of a step. ``generation`` None: flat."""
    grid = on_grid(case, rank, torch.bfloat16)
    if generation is not None:
        group = grid.mesh.expert_group
        made = buffers(generation, group, 128, BATCH * LENGTH, case.model.experts_per_token)
        for stage in grid.stages.values():
            for block in stage.modules():
                if isinstance(block, MoeBlock):
                    block.dispatcher = DeepEp(made, group)
        grid = grid.with_new_executor()
    allocate_main_grads([w for _, w, _ in grid.weights().values()], torch.float32)
    ran = grid.executor.run(grid.prepared(), grid.batch_of(), case.scales)
    losses = [loss.item() for loss in (*ran.main.values(), *ran.mtp.values(), *ran.balance)]
    return {"losses": torch.tensor(losses), **sum_gradients(grid)}


def train(rank: int, _size: int, case: Case) -> list[str]:
    wanted, different = train_on_grid(rank, case, None), []
    for generation in GENERATIONS:
        found = train_on_grid(rank, case, generation)
        assert found.keys() == wanted.keys()
        different += [
            f"{generation}: {name}" for name in wanted if not torch.equal(found[name], wanted[name])
        ]
    return different


def test_a_model_under_dualpipe_trains_the_same() -> None:
    assert run_ranks(train, 4, Case("dualpipe", 2, dp=2, ep=2, microbatches=4)) == [[]] * 4


def decide_what_cannot_be(rank: int, size: int) -> list[str]:
    group = expert_group(rank, size, size)
    dispatcher, said = DeepEp(buffers(2, group), group), []
    for fault in ("nan", "too large", "another layer"):
        ids_NK, weights_NK = torch.tensor([[0, 3], [5, 1]]), torch.rand(2, 2)
        if rank == 1 and fault == "nan":
            weights_NK[1, 0] = float("nan")
        if rank == 1 and fault == "too large":
            ids_NK[0, 1] = E
        routing = TokenRouting(ids_NK, weights_NK)
        with pytest.raises(RoutingFault) as caught:
            planned(dispatcher, routing, layer=8 if rank == 1 and fault == "another layer" else 7)
        said.append(str(caught.value))
    dist.barrier()
    return said


def test_every_rank_is_told_before_a_kernel_would_hang() -> None:
    for nan, too_large, another in run_ranks(decide_what_cannot_be, 2):
        assert "layer 7, expert-parallel rank 1: router weights are not finite" in nan
        assert "layer 7, expert-parallel rank 1: expert ids are outside 0..15" in too_large
        assert "rank 0: layer 7, rank 1: layer 8" in another


def misuse(rank: int, size: int) -> bool:
    """The double is not lenient: what an adapter could get wrong raises."""
    group = expert_group(rank, size, size)
    x, ids, weights = torch.ones(2, D).bfloat16(), torch.tensor([[0, 9], [9, 1]]), torch.rand(2, 2)
    first = buffers(1, group).first(x, ids, weights, E)
    second = buffers(2, group).first(x, ids, weights, E)
    ranks = group.forward[Among.ALL].group
    old, new = Buffer(ranks, 10**6), ElasticBuffer(ranks, 2, D, 2, allow_hybrid_mode=False)
    for wrong in (
        lambda: old.dispatch(x, handle=first.handle, topk_weights=weights),
        lambda: old.dispatch(x.float(), handle=first.handle),
        lambda: old.dispatch(x[:1], handle=first.handle),
        lambda: old.combine(x[:1], first.handle),
        lambda: Buffer(ranks).combine(first.rows_RH, first.handle),
        lambda: old.combine(first.rows_RH, first.handle, topk_weights=first.weights_RK.double()),
        lambda: new.dispatch(x, handle=second.handle, topk_idx=ids, num_sms=4),
        lambda: new.dispatch(torch.ones(3, D).bfloat16(), handle=second.handle, num_sms=4),
    ):
        with pytest.raises(Misuse):
            wrong()
    with pytest.raises(TypeError):
        new.dispatch(x, handle=second.handle)
    with pytest.raises(Misuse):
        ElasticBuffer(ranks, 2, D, 2)
    return True


def test_the_double_is_strict() -> None:
    assert run_ranks(misuse, 2) == [True, True]


def arrive(rank: int, size: int) -> tuple[bool, ...]:
    group = expert_group(rank, size, size)
    dispatcher, routing = DeepEp(buffers(1, group), group), routed(0, size, 0)
    plan = planned(dispatcher, routing, layer=0)
    x_ND = torch.ones(plan.num_tokens, D).bfloat16().requires_grad_()
    moves = (x_ND, routing.weights_NK.clone().requires_grad_())
    transits = [depart(Parcel(None, moves, plan.there), recorded=recorded) for recorded in (True, False)]
    arrived = [transit.arrived().moves for transit in transits]
    return tuple(t.requires_grad for moves in arrived for t in moves)


def test_what_arrives_twice_is_two_tensors() -> None:
    """The weights arrive with the plan: whoever marks them for a gradient must not mark them for others."""
    assert run_ranks(arrive, 2) == [(True, True, False, False)] * 2
