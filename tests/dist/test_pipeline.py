"""The executor on real ranks, in FP64: any schedule on any grid gives the losses and gradients of one process."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import allocate_main_grads
from deepseek_train.pipeline import passage
from deepseek_train.pipeline.executor import PreparedSchedule
from deepseek_train.pipeline.trace import Trace
from deepseek_train.pipeline.values import Ran
from deepseek_train.schedule.action import Kind, Pair
from deepseek_train.schedule.dataflow import actions_of
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.simulate import peak_activations
from tests.dist.cases import CASES
from tests.dist.counted_tape import CountedTape
from tests.dist.grid import Case, OnGrid, Plain, on_grid, sum_gradients
from tests.harness import run_ranks

Losses = dict[int, tuple[Tensor, Tensor | None]]  # by micro-batch: main, MTP


@dataclass(frozen=True)
class RankSaw:
    """What one rank brings home from a training pass and an evaluation of the same micro-batches."""

    dp_rank: int
    pp_rank: int
    ep_rank: int
    losses: Losses
    evaluated: Losses
    loads: dict[int, Tensor]  # of the training pass
    gradients: dict[str, Tensor]
    lone_gradients: list[str]  # weights with a .grad, where main_grad is the only one in use
    graphs: list[str]  # results that still hang on an autograd graph
    queued: int  # groups left in the weight queue
    asked: list[int]  # micro-batches that batch_of was called for, in training
    actions: list[tuple[int, str, int, bool]]  # from the trace: stage, kind, micro-batch, paired
    ordered: bool  # no step begins before the last one ended
    peak_tapes: int
    tapes_after: int  # tapes still alive after training
    tapes_of_evaluation: int
    gradient_free_evaluation: bool  # evaluation left main_grad as it was
    embeddings: int  # different tensors among the embeddings of this rank's stages
    embedding_ranks: tuple[int, ...] | None


def run_cases(rank: int, _world_size: int, cases: list[Case]) -> list[RankSaw]:
    setattr(passage, "Tape", CountedTape)  # noqa: B010  (this process is forked for this function alone)
    return [run_case(rank, case) for case in cases]


def run_case(rank: int, case: Case) -> RankSaw:
    grid = on_grid(case, rank, torch.float64)
    weights = [weight for _, weight, _ in grid.weights().values()]
    allocate_main_grads(weights, torch.float64)
    asked = []

    def batch_of(microbatch: int) -> MicroBatch:
        asked.append(microbatch)
        return grid.batch_of()(microbatch)

    trace = Trace(grid.mesh.pp_rank, torch.device("cpu"))
    CountedTape.forget()
    ran = grid.executor.run(grid.prepared(), batch_of, case.scales, trace)
    peak, tapes_after = CountedTape.peak, len(CountedTape.alive)

    CountedTape.forget()
    before = [weight.main_grad.clone() for weight in weights]
    evaluation = PreparedSchedule(forward_only(case.placement), grid.mesh.pp_rank)
    evaluated = grid.executor.run(evaluation, grid.batch_of(), None)
    untouched = all(torch.equal(a, w.main_grad) for a, w in zip(before, weights, strict=True))
    gradients = sum_gradients(grid)
    return RankSaw(
        dp_rank=grid.mesh.dp_rank,
        pp_rank=grid.mesh.pp_rank,
        ep_rank=grid.mesh.expert_group.rank,
        losses=losses_of(ran),
        evaluated=losses_of(evaluated),
        loads=ran.loads,
        gradients=gradients,
        lone_gradients=[name for name, (_, w, _) in grid.weights().items() if w.grad is not None],
        graphs=[name for name, t in results_of(ran, evaluated) if t.requires_grad],
        queued=len(grid.queue),
        asked=asked,
        actions=[(s.stage, s.kind.value, s.microbatch, s.paired) for s in trace.spans],
        ordered=all(
            a.start <= a.end <= b.start or (a.paired and (a.start, a.end) == (b.start, b.end))
            for a, b in pairwise(trace.spans)
        ),
        peak_tapes=peak,
        tapes_after=tapes_after,
        tapes_of_evaluation=CountedTape.made,
        gradient_free_evaluation=untouched,
        embeddings=number_of_embeddings(grid),
        embedding_ranks=grid.mesh.embedding.ranks if grid.mesh.embedding else None,
    )


def losses_of(ran: Ran) -> Losses:
    return {m: (loss, ran.mtp.get(m)) for m, loss in ran.main.items()}


def results_of(*passes: Ran) -> list[tuple[str, Tensor]]:
    named = []
    for ran in passes:
        named += [(f"main {m}", t) for m, t in ran.main.items()] + [
            (f"mtp {m}", t) for m, t in ran.mtp.items()
        ]
        named += [("balance", t) for t in ran.balance]
        named += [(f"load {layer}", t) for layer, t in ran.loads.items()]
    return named


def number_of_embeddings(grid: OnGrid) -> int:
    return len({stage.embed.data_ptr() for stage in grid.stages.values() if stage.spec.embeds})


@dataclass(frozen=True)
class Expected:
    losses: dict[tuple[int, int], tuple[Tensor, Tensor | None]]
    loads: dict[int, Tensor]
    gradients: dict[str, Tensor]


def run_plain(_rank: int, _world_size: int, cases: list[Case]) -> list[Expected]:
    return [expected(case) for case in cases]


def expected(case: Case) -> Expected:
    plain = Plain(case, torch.float64, torch.float64)
    ends = plain.train()
    loads: dict[int, Tensor] = {}
    for hidden in ends.values():
        for load in hidden.ledger.loads:
            loads[load.layer] = loads.get(load.layer, torch.zeros(())) + load.tokens_E
    losses = {
        key: (h.ledger.main.detach(), None if h.ledger.mtp is None else h.ledger.mtp.detach())
        for key, h in ends.items()
        if h.ledger.main is not None
    }
    return Expected(losses, loads, {name: w.main_grad for name, w in plain.weights.items()})


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, tuple[list[RankSaw], Expected]]:
    """All cases, those of one number of ranks in one set of processes."""
    different = {same_model_and_data(case): case for case in CASES}
    references = dict(
        zip(different, run_ranks(run_plain, 1, list(different.values()), timeout=500)[0], strict=True)
    )
    found: dict[Case, tuple[list[RankSaw], Expected]] = {}
    for cases in batches():
        world = cases[0].layout.world
        for case, *ranks in zip(cases, *run_ranks(run_cases, world, cases, timeout=500), strict=True):
            found[case] = ranks, references[same_model_and_data(case)]
    return found


def batches() -> Iterator[list[Case]]:
    """Cases that share a set of processes: a few, because process groups and their threads live as long."""
    for world in sorted({case.layout.world for case in CASES}):
        cases = [case for case in CASES if case.layout.world == world]
        for start in range(0, len(cases), 4):
            yield cases[start : start + 4]


def same_model_and_data(case: Case) -> tuple[int, ...]:
    """Cases that agree in this have one reference."""
    return case.layers, case.mtp, case.dp, case.microbatches, case.dense, case.tied


every_case = pytest.mark.parametrize("case", CASES, ids=str)
Outcomes = dict[Case, Any]


@every_case
def test_losses_are_those_of_one_process(case: Case, outcomes: Outcomes) -> None:
    ranks, plain = outcomes[case]
    found = {(r.dp_rank, m): losses for r in ranks for m, losses in r.losses.items()}
    assert found.keys() == plain.losses.keys()
    assert sum(len(r.losses) for r in ranks) == case.dp * case.microbatches  # each on one rank only
    for key, losses in found.items():
        for loss, wanted in zip(losses, plain.losses[key], strict=True):
            if wanted is None:
                assert loss is None
                assert case.mtp == 0
            elif case.ep == 1:
                assert torch.equal(loss, wanted), key
            else:  # the sum over a token's experts is bracketed by ranks
                assert abs(loss - wanted) <= 1e-12 * abs(wanted), key


@every_case
def test_gradients_are_those_of_one_process(case: Case, outcomes: Outcomes) -> None:
    ranks, plain = outcomes[case]
    seen = set()
    for r in ranks:
        for name, gradient in r.gradients.items():
            wanted = plain.gradients[name]
            if gradient.shape != wanted.shape:
                wanted = wanted.chunk(case.ep)[r.ep_rank]
            scale = plain.gradients[name].abs().max()
            assert scale > 0, name
            assert (gradient - wanted).abs().max() <= 1e-12 * scale, name
            seen.add(name)
    assert seen == plain.gradients.keys()
    assert [name for r in ranks for name in r.lone_gradients] == []


@every_case
def test_loads_count_every_token_of_every_layer(case: Case, outcomes: Outcomes) -> None:
    ranks, plain = outcomes[case]
    total: dict[int, Tensor] = {}
    for r in ranks:
        for layer, tokens_E in r.loads.items():
            total[layer] = total.get(layer, torch.zeros_like(tokens_E)) + tokens_E
    assert {layer: t.tolist() for layer, t in total.items()} == {
        k: t.tolist() for k, t in plain.loads.items()
    }


@every_case
def test_nothing_is_left_behind(case: Case, outcomes: Outcomes) -> None:
    for r in outcomes[case][0]:
        assert (r.queued, r.tapes_after, r.graphs) == (0, 0, [])


@every_case
def test_tapes_in_flight_are_as_many_as_on_paper(case: Case, outcomes: Outcomes) -> None:
    peaks = peak_activations(case.steps)
    for r in outcomes[case][0]:
        assert r.peak_tapes == peaks[r.pp_rank]


def ends_of(case: Case, microbatch: int) -> tuple[int, int]:
    """The ranks that embed ``microbatch`` and compute its loss."""
    placement = case.placement
    return placement.rank_of(0, microbatch), placement.rank_of(placement.num_stages - 1, microbatch)


@every_case
def test_only_the_ends_of_the_pipeline_read_data(case: Case, outcomes: Outcomes) -> None:
    for r in outcomes[case][0]:
        needs = {m for m in range(case.microbatches) if r.pp_rank in ends_of(case, m)}
        assert set(r.asked) == needs


@every_case
def test_the_trace_is_the_schedule(case: Case, outcomes: Outcomes) -> None:
    schedule = case.steps
    for r in outcomes[case][0]:
        assert r.actions == [
            (action.stage, action.kind.value, action.microbatch, isinstance(step, Pair))
            for step in schedule.steps_R[r.pp_rank]
            for action in actions_of(step)
        ]
        assert r.ordered


@every_case
def test_evaluation_gives_the_losses_of_training_and_keeps_nothing(case: Case, outcomes: Outcomes) -> None:
    for r in outcomes[case][0]:
        assert r.evaluated.keys() == r.losses.keys()
        for microbatch, losses in r.evaluated.items():
            for loss, trained in zip(losses, r.losses[microbatch], strict=True):
                assert (loss is None) == (trained is None)
                assert loss is None or torch.equal(loss, trained)
        assert r.tapes_of_evaluation == 0
        assert r.gradient_free_evaluation


@every_case
def test_the_embedding_is_one_weight(case: Case, outcomes: Outcomes) -> None:
    """One tensor where a rank holds both ends; one replica group where two ranks hold an end each."""
    specs = case.specs
    holders = sorted({p for s in specs if s.embeds for p in case.placement.holders_of(s.index)})
    for r in outcomes[case][0]:
        holds = r.pp_rank in holders
        assert r.embeddings == (1 if holds else 0)
        ranks = tuple(p * case.dp + d for p in holders for d in range(case.dp))
        assert r.embedding_ranks == (ranks if holds else None)
    first, last = ends_of(case, 0)
    assert set(holders) >= ({first, last} if case.mtp or case.tied else {first})


def test_the_cases_run_every_kind_of_action(outcomes: Outcomes) -> None:
    kinds = {kind for ranks, _ in outcomes.values() for r in ranks for _, kind, _, _ in r.actions}
    assert kinds == {kind.value for kind in Kind}
    assert any(paired for ranks, _ in outcomes.values() for r in ranks for *_, paired in r.actions)
