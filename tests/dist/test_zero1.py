"""ZeRO-1 against its replicated twin, and in itself: shards, skipped steps, state out and in.

Where bits are compared, gradients are small integers times a power of two: their sums are exact in any order. (Of real
gradients replicas hold sums that depend on the order: reduce-scatter of a flat buffer adds otherwise than all-reduce of
each weight.)
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.config.schema import CurveConfig, OptimConfig
from deepseek_train.optim.groups import DistributedOptimizer, StepOutcome, WeightGroup
from deepseek_train.optim.quiet_deepspeed import adopt_process_group
from deepseek_train.optim.replicated import Replicated
from deepseek_train.optim.zero1 import Zero1
from deepseek_train.phases.wgrad import Weight
from tests.dist.grid import Case, OnGrid, on_grid
from tests.harness import run_ranks

CASE = Case("dualpipe", 2, dp=2, ep=2, layers=3, microbatches=4)
WORLD, STEPS = CASE.layout.world, 5
NEVER = CurveConfig(0.0)  # curves that the optimizers do not read


def config(clip: float = 0.0, eps: float = 1e-8) -> OptimConfig:
    return OptimConfig(NEVER, NEVER, NEVER, NEVER, eps=eps, weight_decay=0.1, clip_norm=clip)


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def groups_of(dtype: torch.dtype, rank: int) -> tuple[OnGrid, list[WeightGroup]]:
    adopt_process_group()
    grid = on_grid(CASE, rank, dtype)
    return grid, grid.groups(config().weight_decay)


def clones(groups: list[WeightGroup]) -> list[WeightGroup]:
    """The same weights once more, for another optimizer."""
    return [
        WeightGroup({n: Weight(w.detach().clone()) for n, w in g.weights.items()}, g.replicas, g.weight_decay)
        for g in groups
    ]


def weights_of(groups: list[WeightGroup]) -> dict[str, Weight]:
    return {name: weight for group in groups for name, weight in group.weights.items()}


def exact_gradients(groups: list[WeightGroup], seed: int, rank: int) -> None:
    """Adds other gradients on every rank, multiples of 1/64 up to 1/8: sums over ranks are exact in FP32."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    for weight in weights_of(groups).values():
        weight.main_grad += torch.randint(-8, 9, weight.shape, generator=generator) / 64.0


def step(optimizer: DistributedOptimizer) -> StepOutcome:
    optimizer.reduce()
    return optimizer.step(lr=1e-2)


# --- against the replicated twin, bit for bit -------------------------------------------------------------------


def both_kinds(rank: int, _world_size: int) -> list[str]:
    """Names of weights whose bits differ after five steps: BF16 weights and moments, no clipping."""
    _, groups = groups_of(torch.bfloat16, rank)
    twins = clones(groups)
    before = {name: w.detach().clone() for name, w in weights_of(groups).items()}
    zero1 = Zero1(groups, world(), config(), torch.bfloat16)
    replicated = Replicated(twins, world(), config(), torch.bfloat16)
    for number in range(STEPS):
        exact_gradients(groups, number, rank)
        exact_gradients(twins, number, rank)
        a, b = step(zero1), step(replicated)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
    assert {f.exp_avg.dtype for f in zero1.fragments()} == {torch.bfloat16}
    mine, theirs = weights_of(groups), weights_of(twins)
    assert not any(torch.equal(mine[name], before[name]) for name in mine)
    whole = {f.name: f for f in replicated.fragments()}
    for f in zero1.fragments():
        for part, all_of_it in zip(parts(f), parts(whole[f.name]), strict=True):
            assert torch.equal(part, all_of_it[f.start : f.start + len(part)]), f.name
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def parts(fragment: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fragment.master, fragment.exp_avg, fragment.exp_avg_sq


def test_sharded_and_replicated_give_the_same_bits() -> None:
    assert run_ranks(both_kinds, WORLD) == [[]] * WORLD


# --- a gradient that is not finite ------------------------------------------------------------------------------


def skip_one(rank: int, _world_size: int, kind: Any, poison: float) -> None:
    _, groups = groups_of(torch.bfloat16, rank)
    untouched = clones(groups)
    optimizer, reference = (kind(g, world(), config(), torch.bfloat16) for g in (groups, untouched))
    weights = weights_of(groups)
    before = {name: w.detach().clone() for name, w in weights.items()}
    exact_gradients(groups, 7, rank)
    if rank == 1:
        list(weights.values())[-1].main_grad.view(-1)[-1] = poison
    outcome = step(optimizer)
    assert outcome == StepOutcome(float("inf"), "a gradient is not finite")  # on every rank
    assert optimizer.steps_taken() == 0
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]), name
        assert not weight.main_grad.any(), name
    for g, o in ((groups, optimizer), (untouched, reference)):
        exact_gradients(g, 8, rank)
        assert not step(o).skipped
        assert o.steps_taken() == 1
    for name, weight in weights_of(untouched).items():
        assert torch.equal(weights[name], weight), name
        assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize("kind", [Zero1, Replicated])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_all_ranks_skip_a_step_together_and_go_on(kind: Any, poison: float) -> None:
    run_ranks(skip_one, WORLD, kind, poison)


# --- what is where ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A rank's share of one group of replicas."""

    replicas: tuple[int, ...]
    sizes: dict[str, int]  # elements of each weight
    fragments: list[tuple[str, int, int]]  # weight, start, elements


def shares(rank: int, _world_size: int) -> list[Held]:
    _, groups = groups_of(torch.bfloat16, rank)
    optimizer = Zero1(groups, world(), config(), torch.float32)
    flat = {t.untyped_storage().data_ptr() for t in optimizer._inner.fp32_groups_gradients_flat}
    for weight in weights_of(groups).values():
        assert weight.main_grad.dtype == torch.float32
        assert weight.main_grad.shape == weight.shape
        assert weight.main_grad.untyped_storage().data_ptr() in flat
    found = [(f.name, f.start, f.master.numel()) for f in optimizer.fragments()]
    assert all(p.numel() == f.master.numel() for f in optimizer.fragments() for p in parts(f))
    return [
        Held(
            tuple(dist.get_process_group_ranks(g.replicas)),
            {name: w.numel() for name, w in g.weights.items()},
            [piece for piece in found if piece[0] in g.weights],
        )
        for g in groups
    ]


def test_the_state_is_sharded_and_every_element_is_held_once() -> None:
    held_R = run_ranks(shares, WORLD)
    for held in {h.replicas + tuple(h.sizes): h for rank in held_R for h in rank}.values():
        assert len(held.replicas) > 1  # in DualPipe every weight has a mirror
        covered: Counter[tuple[str, int]] = Counter()
        for rank in held.replicas:
            (mine,) = (h for h in held_R[rank] if h.sizes == held.sizes)
            covered.update((name, start + i) for name, start, count in mine.fragments for i in range(count))
            elements = sum(count for *_, count in mine.fragments)
            assert elements <= sum(held.sizes.values()) / len(held.replicas) + 8  # DeepSpeed pads to align
        wanted = {(name, i) for name, size in held.sizes.items() for i in range(size)}
        assert covered.keys() == wanted
        assert set(covered.values()) == {1}


def reductions(rank: int, _world_size: int) -> None:
    _, groups = groups_of(torch.float32, rank)
    optimizer = Zero1(groups, world(), config(), torch.float32)
    called = []
    reduce_scatter = dist.reduce_scatter_tensor

    def counted(output: Tensor, tensor: Tensor, **where: Any) -> Any:
        called.append((where["group"], tensor.numel()))
        return reduce_scatter(output, tensor, **where)

    setattr(dist, "reduce_scatter_tensor", counted)  # noqa: B010  (this process is forked for this function alone)
    optimizer.reduce()
    assert [group for group, _ in called] == [g.replicas for g in groups]
    for (_, elements), group in zip(called, groups, strict=True):
        assert elements >= sum(w.numel() for w in group.weights.values())


def test_each_group_of_weights_has_one_reduce_scatter() -> None:
    run_ranks(reductions, WORLD)


# --- state out, state in ----------------------------------------------------------------------------------------


def round_trip(rank: int, _world_size: int, kind: Any, moments: torch.dtype) -> None:
    _, groups = groups_of(torch.bfloat16, rank)
    fresh = clones(groups)
    first = kind(groups, world(), config(clip=1.0), moments)
    for number in range(3):
        exact_gradients(groups, number, rank)
        step(first)
    with torch.no_grad():
        for weight in weights_of(fresh).values():
            weight.fill_(float("nan"))  # everything has to come from the fragments
    second = kind(fresh, world(), config(clip=1.0), moments)
    for old, new in zip(copy.deepcopy(first.fragments()), second.fragments(), strict=True):
        assert (old.name, old.start) == (new.name, new.start)
        for a, b in zip(parts(old), parts(new), strict=True):
            b.copy_(a)
    second.restore(first.steps_taken())
    assert second.steps_taken() == 3
    compare(groups, fresh)
    for g, o in ((groups, first), (fresh, second)):
        exact_gradients(g, 9, rank)
        assert not step(o).skipped
    compare(groups, fresh)
    for old, new in zip(first.fragments(), second.fragments(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parts(old), parts(new), strict=True)), old.name


def compare(groups: list[WeightGroup], fresh: list[WeightGroup]) -> None:
    found = weights_of(fresh)
    for name, weight in weights_of(groups).items():
        assert torch.equal(weight, found[name]), name


@pytest.mark.parametrize("kind", [Zero1, Replicated])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_fresh_optimizer_goes_on_from_the_fragments(kind: Any, moments: torch.dtype) -> None:
    run_ranks(round_trip, WORLD, kind, moments)
