"""The average of the weights in a job: PP2 (DualPipe), EP2 across the mirrors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_train.checkpoint.pieces import Snapshot
from deepseek_train.checkpoint.store import save
from deepseek_train.config.schema import RunConfig
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.train.averaged import averaged_weights
from deepseek_train.train.build import Job, build
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.state import Progress, checkpoint_of, load_checkpoint, snapshot
from deepseek_train.train.step import evaluate, train_step
from tests.dist.small_run import small_configs
from tests.harness import run_ranks

WORLD, DECAY = 2, 0.6
LAYOUT = [
    "parallel.pp=2",
    "parallel.dp=1",
    "parallel.ep=2",
    "parallel.ep_across_mirrors=true",
    f"optim.ema_decay={DECAY}",
    "precision=bf16",
    "train.eval_microbatches=2",
    "optim.batch_size.start=8",
    "data.sequence_length=16",
]


def averaged(rank: int, world_size: int, config: RunConfig, folder: Path) -> None:
    place = Place(rank, world_size, rank, world_size, torch.device("cpu"))
    layout = resolve_layout(config, world_size)
    job, progress = build(config, layout, place), Progress()
    assert job.ema is not None
    wanted: dict[tuple[str, int], Tensor] = {}
    for number in range(1, 5):
        progress, metrics = train_step(job, progress, traced=False)
        assert not metrics.skipped
        for fragment in job.optimizer.fragments():
            place_of = fragment.name, fragment.start
            average = wanted.get(place_of, fragment.master)
            wanted[place_of] = torch.lerp(average, fragment.master, max(1 - DECAY, 1 / number))
    found = {(average.name, average.start): average.tensor for average in job.ema.averages()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)

    before = [one.weight.detach().clone() for one in job.weights]
    pieces = {piece.name: piece.tensor.clone() for piece in snapshot(job, {}).pieces}
    evaluated = evaluate(job, progress)
    with averaged_weights(job, job.ema):
        inside = evaluate_alone(job, progress)
        assert not all(torch.equal(o.weight, was) for o, was in zip(job.weights, before, strict=True))
    assert evaluated.ema_loss == inside
    assert evaluated.loss == evaluate_alone(job, progress)
    assert evaluated.ema_loss != evaluated.loss
    for one, was in zip(job.weights, before, strict=True):
        assert torch.equal(one.weight, was), one.spec.name
    assert all(torch.equal(piece.tensor, pieces[piece.name]) for piece in snapshot(job, {}).pieces)

    full = checkpoint_of(job, progress, None)
    path = save(folder, 4, full, keep=9)
    without = [piece for piece in full.pieces if not piece.name.startswith("ema/")]
    bare = save(folder, 5, Snapshot(without, full.replicated, full.facts), keep=9)
    train_step(job, progress, traced=False)
    load_checkpoint(job, path)
    for average in job.ema.averages():
        assert torch.equal(average.tensor, wanted[average.name, average.start]), average.name

    train_step(job, progress, traced=False)
    load_checkpoint(replace(job, ema=None), path)  # a run that gives its averages up
    load_checkpoint(job, bare)  # and one that begins with them
    for fragment, average in zip(job.optimizer.fragments(), job.ema.averages(), strict=True):
        assert torch.equal(average.tensor, fragment.master), average.name


def evaluate_alone(job: Job, progress: Progress) -> float:
    """The loss of the weights as they stand."""
    return evaluate(replace(job, ema=None), progress).loss


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_configs(tmp_path_factory.mktemp("ema"), WORLD, {"": LAYOUT})[""]


def test_averages_follow_the_masters_stand_in_for_them_and_are_restored(
    config: RunConfig, tmp_path: Path
) -> None:
    run_ranks(averaged, WORLD, config, tmp_path)
