"""Skipped steps, rollbacks, the end of a run that cannot go on: PP2 (DualPipe), EP2 across the mirrors, a few steps.

A sequence is poisoned by its number: whoever reads it finds a NaN among its gradients, whichever step reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_train.checkpoint.folders import newest
from deepseek_train.cli.train_rank import rank_main
from deepseek_train.config.exit_codes import ExitCode
from deepseek_train.config.guard import GuardConfig
from deepseek_train.config.schema import RunConfig
from deepseek_train.data.loader import Cursor, StreamIdentity, TokenSource
from deepseek_train.data.windows import Window
from deepseek_train.monitor.events import read_events
from deepseek_train.monitor.jsonl import read_history
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.phases.wgrad import Weight
from deepseek_train.train.build import Job, build
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.guard import GuardError
from deepseek_train.train.loop import train
from deepseek_train.train.observer import Observer
from deepseek_train.train.state import Progress, load_checkpoint, snapshot
from deepseek_train.train.step import train_step
from tests.dist.small_run import SMALL, small_configs
from tests.harness import run_ranks

WORLD, STEPS, BATCH, LENGTH = 2, 6, 8, 16
ROW = Window(3 * BATCH, 5 * BATCH)  # the sequences of steps 4 and 5
GUARD = GuardConfig(mean_steps=2, max_skips=2, max_rollbacks=1)
LAYOUT = [
    "parallel.pp=2",
    "parallel.dp=1",
    "parallel.ep=2",
    "parallel.ep_across_mirrors=true",
    "optim.mtp_weight.segments=[]",  # as all curves here: what a skipped step adds to the tokens changes nothing
    "optim.ema_decay=0.5",
    f"data.sequence_length={LENGTH}",
    f"optim.batch_size.start={BATCH}",
    f"train.total_tokens={STEPS * BATCH * LENGTH}",
    "train.eval_microbatches=2",
    "train.sample_prompt=''",
    "train.check_replicas_every=3",
    "checkpoint.every=2",
]


@dataclass(frozen=True)
class Poisoned:
    """A source that poisons the gradients of ``victim`` when one of ``numbers`` is read."""

    source: TokenSource
    victim: Weight
    numbers: range

    @property
    def identity(self) -> StreamIdentity:
        return self.source.identity

    @property
    def tokenizer_hash(self) -> str:
        return self.source.tokenizer_hash

    def sequences(self, indices: Sequence[int]) -> NDArray[np.int64]:
        if not set(indices).isdisjoint(self.numbers):
            self.victim.main_grad.view(-1)[0] = float("nan")  # gradients are added to this
        return self.source.sequences(indices)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    found = small_configs(tmp_path_factory.mktemp("guard"), WORLD, {"": LAYOUT})[""]
    return replace(found, train=replace(found.train, guard=GUARD))


def job_of(config: RunConfig, rank: int, poisoned: range = range(0)) -> Job:
    place = Place(rank, WORLD, rank, WORLD, torch.device("cpu"))
    job = build(config, resolve_layout(config, WORLD), place)
    source = Poisoned(job.train_source, job.weights[0].weight, poisoned)
    return replace(job, train_source=source)  # type: ignore[arg-type]


def state(job: Job) -> dict[str, Tensor]:
    """Copies of all that a checkpoint would hold of this rank, and the weights."""
    found = snapshot(job, {})
    tensors = {f"{piece.name} {piece.start}": piece.tensor for piece in found.pieces} | found.replicated
    tensors |= {one.spec.name: one.weight.detach() for one in job.weights}
    assert sum(name.startswith("ema/") for name in tensors) == len(job.optimizer.fragments())
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def told_from_the_start(config: RunConfig, rank: int, steps: int = STEPS) -> tuple[Job, Progress]:
    """A run of healthy data that leaves the row's sequences out."""
    job, progress = job_of(config, rank), Progress(cursor=Cursor(0, (ROW,)))
    for _ in range(steps):
        progress, metrics = train_step(job, progress, traced=False)
        assert not metrics.skipped
    return job, progress


def skip_two(rank: int, _world_size: int, config: RunConfig) -> None:
    job, progress, skipped = job_of(config, rank, range(ROW.first, ROW.end)), Progress(), []
    for _ in range(STEPS):
        before = state(job)
        progress, metrics = train_step(job, progress, traced=False)
        skipped.append(metrics.skipped)
        if metrics.skipped:
            assert_same(state(job), before)
            assert metrics.skipped_why == "a gradient is not finite"
    assert skipped == [3 <= step < 5 for step in range(STEPS)]
    assert metrics.skipped_steps == progress.guard.skipped == 2

    other, theirs = told_from_the_start(config, rank, STEPS - 2)
    assert_same(state(job), state(other))
    assert job.optimizer.steps_taken() == other.optimizer.steps_taken() == STEPS - 2
    means = replace(progress.guard, skipped=0, row_after_step=0, row_start=0)
    assert means == theirs.guard
    assert progress.cursor.number(progress.cursor.consumed_sequences) == theirs.cursor.number(
        theirs.cursor.consumed_sequences
    )


def test_skipped_steps_leave_what_a_run_without_their_data_has(config: RunConfig) -> None:
    """With flat curves, to the bit: weights, masters, moments, averages, router biases, the guard's means."""
    run_ranks(skip_two, WORLD, config)


def go_back(rank: int, _world_size: int, config: RunConfig, folder: Path) -> None:
    """In one go, and in sessions of one step each: both are the run that was told the window from the start."""
    setattr(Observer, "report", lambda *_: None)  # noqa: B010  (in this process alone: pictures take their time)
    other, theirs = told_from_the_start(config, rank)
    wanted = state(other)
    sessions = 0
    for name, seconds in (("whole", None), ("cut", 0.0)):
        root = folder / name
        root.mkdir(exist_ok=True)
        config = replace(config, train=replace(config.train, stop_after_seconds=seconds))
        job, progress = job_of(config, rank, range(ROW.first + 3, ROW.end - 3)), Progress()
        while progress.step < STEPS:
            train(job, root)
            ended = newest(root / "checkpoints")
            assert ended is not None
            progress, _ = load_checkpoint(job, ended)
            sessions += 1
        assert_same(state(job), wanted)
        assert replace(progress, wall_seconds=0.0) == replace(theirs, wall_seconds=0.0)
    assert sessions > 3
    if rank == 0:
        assert_told(folder)


def assert_told(folder: Path) -> None:
    for name in ("whole", "cut"):
        steps = read_history(folder / name / "metrics.jsonl").steps
        assert [metrics.step for metrics in steps] == list(range(1, STEPS + 1))
        assert not any(metrics.skipped for metrics in steps)
        events = read_events(folder / name)
        assert [(e.step, e.what, e.window) for e in events] == [
            (4, "skipped", (3 * BATCH, 4 * BATCH)),
            (5, "skipped", (4 * BATCH, 5 * BATCH)),
            (5, "rolled back", (ROW.first, ROW.end)),
        ]
    assert "back to step 2, sequences [24, 40) are left out" in read_events(folder / "whole")[-1].why
    assert "back to step 3," in events[-1].why  # which saved after every step


def test_a_run_rolled_back_is_the_run_that_was_told_the_window(config: RunConfig, tmp_path: Path) -> None:
    run_ranks(go_back, WORLD, config, tmp_path)


def give_up(rank: int, _world_size: int, config: RunConfig, folder: Path, poisoned: range) -> str:
    job = job_of(config, rank, poisoned)
    with pytest.raises(GuardError) as raised:
        train(job, folder)
    return str(raised.value)


@pytest.mark.parametrize(
    ("first", "said", "what"),
    [
        (
            3,
            "after 1 rollbacks to step 2; sequences [24, 40), [40, 56)",
            ["skipped"] * 2 + ["rolled back"] + ["skipped"] * 2,
        ),
        (1, "and no checkpoint is from before them", ["skipped"] * 2),
    ],
)  # fmt: skip
def test_a_run_that_cannot_go_on_stops_and_says_where(
    first: int, said: str, what: list[str], config: RunConfig, tmp_path: Path
) -> None:
    one, other = run_ranks(give_up, WORLD, config, tmp_path, range(first * BATCH, 9 * BATCH))
    assert one == other
    assert said in one
    assert "steps 4 to 5" in one or first == 1
    assert [event.what for event in read_events(tmp_path)] == [*what, "stopped"]


def command(_rank: int, _world_size: int, arguments: list[str]) -> int:
    return rank_main(arguments)


def test_the_command_ends_with_the_guards_own_exit_code(tmp_path: Path) -> None:
    """With a factor this close to 1 the first loss that rises is a spike, and there is no checkpoint yet."""
    flat = ["optim.lr.start=0"]  # losses rise and fall with the data alone
    alone = ["parallel.pp=1", "parallel.dp=1", "parallel.ep=1", "schedule=1f1b", "train.eval_microbatches=2"]
    touchy = ["loss_factor=1.000001", "mean_steps=1", "max_skips=1"]
    arguments = [*flat, *alone, *(f"train.guard.{setting}" for setting in touchy)]
    config = small_configs(tmp_path, 1, {"": arguments})[""]
    paths = [f"data.path={config.data.path}", f"run_dir={config.run_dir}"]
    assert run_ranks(command, 1, [*SMALL, *arguments, *paths], group=False) == [ExitCode.GIVEN_UP]
    assert [event.what for event in read_events(Path(config.run_dir))] == ["skipped", "stopped"]


def spike(rank: int, _world_size: int, config: RunConfig) -> list[str | None]:
    """A loss is raised by hand for one step, by weights ten times as large in the last stage."""
    job, progress, reasons = job_of(config, rank), Progress(), []
    heads = [one.weight for one in job.weights if one.spec.name == "head"]
    for step in range(4):
        if step == 2:
            for weight in heads:
                weight.data.mul_(100)
        before = state(job)
        progress, metrics = train_step(job, progress, traced=False)
        reasons.append(metrics.skipped_why)
        if metrics.skipped:
            assert_same(state(job), before)
            job.optimizer.restore(job.optimizer.steps_taken())  # published anew: the weights are well again
    return reasons


def test_a_spike_is_skipped_on_all_ranks(config: RunConfig) -> None:
    first, second = run_ranks(spike, WORLD, config)
    assert first == second
    assert [reason is not None for reason in first] == [False, False, True, False]
    assert "times its running mean" in str(first[2])
