"""Recomputation on real ranks, in FP64: the same bits, and everything exactly once, under every schedule."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_train.config.schema import Forgettable
from deepseek_train.model.block import DenseBlock
from deepseek_train.phases.wgrad import allocate_main_grads
from deepseek_train.schedule.action import Kind, Pair
from deepseek_train.schedule.catalog import NAMES, make_schedule
from deepseek_train.schedule.dataflow import actions_of
from tests.dist.grid import Case, on_grid
from tests.harness import run_ranks
from tests.helpers.counting import PHASES, Counts, count

FINE: tuple[Forgettable, ...] = ("norm", "mla_up", "swiglu")
KINDS: tuple[tuple[Forgettable, ...], ...] = ((), FINE, ("block",))
CASES = [
    *(Case(name, 2, microbatches=4) for name in NAMES),  # MTP, uneven stages, a dense layer
    Case("1f1b", 1, dp=2, ep=2, microbatches=2),
]
BOTH = [(case, kinds) for case in CASES for kinds in KINDS]


@dataclass(frozen=True)
class RankSaw:
    losses: dict[int, tuple[Tensor, Tensor | None]]
    gradients: dict[str, Tensor]
    counts: Counts
    phases: int  # that compute: micro-batches times those of all blocks of this rank that they ran through


def run_all(rank: int, _world_size: int) -> list[RankSaw]:
    counts = count(setattr)  # this process is forked for this function alone
    return [run_case(replace(case, recompute=kinds), rank, counts) for case, kinds in BOTH]


def run_case(case: Case, rank: int, counts: Counts) -> RankSaw:
    grid = on_grid(case, rank, torch.float64)
    allocate_main_grads([weight for _, weight, _ in grid.weights().values()], torch.float64)
    counts.clear()
    ran = grid.executor.run(grid.prepared(), grid.batch_of(), case.scales)
    gradients = {name: weight.main_grad for name, (_, weight, _) in grid.weights().items()}
    schedule = make_schedule(case.schedule, case.pp, case.microbatches)
    forwards = Counter(
        action.stage
        for step in schedule.steps_R[grid.mesh.pp_rank]
        for action in actions_of(step)
        if action.kind is Kind.FORWARD
    )
    blocks = {
        index: sum(2 if isinstance(block, DenseBlock) else 3 for block in stage.layers.values())
        + 3 * len(stage.mtp)
        for index, stage in grid.stages.items()
    }
    return RankSaw(
        {m: (loss, ran.mtp.get(m)) for m, loss in ran.main.items()},
        gradients,
        counts.copy(),
        sum(count * blocks[stage] for stage, count in forwards.items()),
    )


Outcomes = dict[tuple[Case, tuple[Forgettable, ...]], list[RankSaw]]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return {key: list(ranks) for key, *ranks in zip(BOTH, *run_ranks(run_all, 2, timeout=120), strict=True)}


every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_kind = pytest.mark.parametrize("kinds", KINDS[1:], ids="-".join)


@every_case
@every_kind
def test_every_bit_is_that_of_a_run_that_keeps_all(
    case: Case, kinds: tuple[Forgettable, ...], outcomes: Outcomes
) -> None:
    for found, expected in zip(outcomes[case, kinds], outcomes[case, ()], strict=True):
        assert same(found.losses, expected.losses)
        assert same(found.gradients, expected.gradients)


def same(found: Any, expected: Any) -> bool:
    match expected:
        case Tensor():
            return torch.equal(found, expected)
        case dict():
            return found.keys() == expected.keys() and all(same(found[k], v) for k, v in expected.items())
        case tuple():
            return all(same(a, b) for a, b in zip(found, expected, strict=True))
        case _:
            return bool(found == expected)


@every_case
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(kinds) or "none")
def test_every_function_runs_its_two_gradients_once(
    case: Case, kinds: tuple[Forgettable, ...], outcomes: Outcomes
) -> None:
    """dX once and dW once for each time the plain forward ran it: in a full backward, split, and inside pairs."""
    for found, plain in zip(outcomes[case, kinds], outcomes[case, ()], strict=True):
        assert plain.counts.forward["_Linear"] > 0
        assert found.counts.backward == plain.counts.forward
        assert found.counts.works == [[1]] * found.counts.functions_with_weight


@every_case
@every_kind
def test_what_is_forgotten_is_computed_once_more(
    case: Case, kinds: tuple[Forgettable, ...], outcomes: Outcomes
) -> None:
    for found, plain in zip(outcomes[case, kinds], outcomes[case, ()], strict=True):
        phases = sum(found.counts.phases[f"{owner.__name__}.{name}"] for owner, name in PHASES)
        assert found.counts.phases["MoeBlock.plan"] == plain.counts.phases["MoeBlock.plan"]
        if kinds == ("block",):
            assert phases == 2 * found.phases  # everything twice
            continue
        assert phases == found.phases
        assert {r.kind for r in found.counts.regions if r.makes and r.runs == 2} == set(kinds)
        for region in found.counts.regions:
            assert region.runs == (2 if region.kind in kinds and region.makes else 1), region


def test_the_schedules_split_backwards_and_overlap_chunks() -> None:
    """Else the tests above would say little."""
    steps = [step for name in NAMES for row in make_schedule(name, 2, 4).steps_R for step in row]
    assert any(isinstance(step, Pair) for step in steps)
    kinds = {action.kind for step in steps for action in actions_of(step)}
    assert kinds == set(Kind)
