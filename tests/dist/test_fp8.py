"""FP8 training on real ranks: every schedule gives the losses of one process, tokens may travel in FP8 without a bit of
difference, and ZeRO-1 training learns, stops and goes on to the same bits.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_train.checkpoint.store import save
from deepseek_train.config.schema import Fp8Config, RunConfig
from deepseek_train.parallel.expert.dispatcher import flat
from deepseek_train.parallel.expert.journey import UNCHANGED, WireFormats
from deepseek_train.parallel.expert.wire import WireFormat
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.phases.wgrad import allocate_main_grads
from deepseek_train.train.build import build
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.state import Progress, checkpoint_of, load_checkpoint
from deepseek_train.train.step import evaluate, train_step
from tests.dist.grid import Case, Plain, mesh_of, on_mesh, sum_gradients
from tests.dist.small_run import small_configs
from tests.harness import run_ranks

V3 = Fp8Config()
BASE = Case("1f1b", 2, layers=3, microbatches=4, fp8=V3)
PIPELINES = [
    BASE,
    replace(BASE, schedule="zb_h1"),
    replace(BASE, schedule="dualpipe"),
    replace(BASE, schedule="dualpipe", recompute=("norm", "mla_up", "swiglu")),
    replace(BASE, schedule="dualpipe", recompute=("block",)),
]
SPREAD = Case("dualpipe", 2, dp=2, ep=2, layers=3, microbatches=4, fp8=V3)
IN_FP8 = WireFormats(WireFormat.FP8, WireFormat.BF16)
Losses = dict[tuple[int, int], tuple[Tensor, Tensor]]  # by data-parallel rank and micro-batch: main, MTP


@dataclass(frozen=True)
class RankSaw:
    losses: Losses
    gradients: dict[str, Tensor]
    ep_rank: int


def run_case(rank: int, case: Case, formats: WireFormats = UNCHANGED) -> RankSaw:
    mesh = mesh_of(case, rank)
    grid = on_mesh(case, mesh, torch.bfloat16, flat(mesh.expert_group, formats))
    allocate_main_grads([weight for _, weight, _ in grid.weights().values()], torch.float32)
    ran = grid.executor.run(grid.prepared(), grid.batch_of(), case.scales)
    losses = {(mesh.dp_rank, m): (loss, ran.mtp[m]) for m, loss in ran.main.items()}
    return RankSaw(losses, sum_gradients(grid), mesh.expert_group.rank)


def run_pipelines(rank: int, _world_size: int) -> list[RankSaw]:
    return [run_case(rank, case) for case in PIPELINES]


def run_spread(rank: int, _world_size: int) -> list[RankSaw]:
    return [run_case(rank, SPREAD, formats) for formats in (UNCHANGED, IN_FP8)]


def run_plain(_rank: int, _world_size: int, case: Case) -> tuple[Losses, dict[str, Tensor]]:
    plain = Plain(case, torch.bfloat16, torch.float32)
    losses = {
        key: (hidden.ledger.main.detach(), hidden.ledger.mtp.detach())
        for key, hidden in plain.train().items()
        if hidden.ledger.main is not None and hidden.ledger.mtp is not None
    }
    return losses, {name: weight.main_grad for name, weight in plain.weights.items()}


def all_losses(ranks: list[RankSaw]) -> Losses:
    return {key: losses for rank in ranks for key, losses in rank.losses.items()}


def test_every_schedule_gives_the_losses_of_one_process() -> None:
    ((losses, gradients),) = run_ranks(run_plain, 1, BASE)
    for case, *ranks in zip(PIPELINES, *run_ranks(run_pipelines, 2), strict=True):
        assert all_losses(ranks) == losses, case
        for name, gradient in (item for rank in ranks for item in rank.gradients.items()):
            wanted = gradients[name]
            # The same numbers for each micro-batch, added up in another order.
            assert (gradient - wanted).abs().max() <= 1e-6 * wanted.abs().max(), (case, name)


def test_tokens_travel_in_fp8_without_a_bit_of_difference() -> None:
    """Experts and the backward of combines would quantise to the same powers of two anyway (docs/log.md)."""
    ((losses, _),) = run_ranks(run_plain, 1, SPREAD)
    ranks = run_ranks(run_spread, 4)
    for as_they_are, in_fp8 in ranks:
        assert as_they_are.losses == in_fp8.losses
        for name, gradient in as_they_are.gradients.items():
            assert gradient.any(), name
            assert torch.equal(gradient, in_fp8.gradients[name]), name
    found = all_losses([rank for rank, _ in ranks])
    assert found.keys() == losses.keys()
    # What experts on two ranks give is rounded to BF16 before it is added up: that may sway a router.
    for key, pair in losses.items():
        assert torch.stack(found[key]).tolist() == pytest.approx(torch.stack(pair).tolist(), rel=0.02)


@dataclass(frozen=True)
class Run:
    losses: list[float]
    again: list[float]  # of the steps after the checkpoint, once more from there
    evaluations: tuple[float, float]
    quantised: list[int]  # weights, as each step ends
    skipped: bool


STEPS, SAVED_AFTER = 10, 7


def train_and_resume(rank: int, world: int, config: RunConfig, folder: Path) -> Run:
    """The checkpoint is read back into the job that has trained on: with copies of weights that are no longer."""
    job = build(config, resolve_layout(config, world), Place(rank, world, rank, world, torch.device("cpu")))
    assert job.fp8 is not None
    progress, losses, again, quantised, skipped = Progress(), [], [], [], False
    for number in range(STEPS):
        progress, metrics = train_step(job, progress, traced=False)
        losses.append(metrics.loss)
        quantised.append(len(job.fp8.copies))
        skipped = skipped or metrics.skipped
        if number + 1 == SAVED_AFTER:
            saved = save(folder, progress.step, checkpoint_of(job, progress, None), keep=1)
    ended = evaluate(job, progress)
    progress, _ = load_checkpoint(job, saved)
    for _ in range(STEPS - SAVED_AFTER):
        progress, metrics = train_step(job, progress, traced=False)
        again.append(metrics.loss)
    return Run(losses, again, (ended.loss, evaluate(job, progress).loss), quantised, skipped)


def test_zero1_training_learns_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    layout = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "train.eval_microbatches=2"]
    overrides = ["precision=fp8", "model.num_layers=3", "optim.lr.start=5e-3", "optim.batch_size.start=16"]
    configs = small_configs(tmp_path, 4, {"fp8": [*layout, *overrides]})
    runs = run_ranks(train_and_resume, 4, configs["fp8"], tmp_path / "checkpoints", timeout=120)
    for run in runs:
        assert run.losses == runs[0].losses
        assert run.again == run.losses[SAVED_AFTER:]
        assert run.evaluations[0] == run.evaluations[1]
        assert run.quantised == [0] * STEPS  # forgotten with every step
        assert not run.skipped
    assert runs[0].losses[-1] < runs[0].losses[0] - 0.5
