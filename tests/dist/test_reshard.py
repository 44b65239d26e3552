"""A checkpoint of one layout goes on in any other: the same bits of weights and optimizer state, the same batches, and
back in its own layout the very run that was never moved.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deepseek_train.checkpoint.store import save
from deepseek_train.checkpoint.stored import StoredCheckpoint
from deepseek_train.config.schema import RunConfig
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.train.build import Job, build
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.state import Progress, checkpoint_of, load_checkpoint, load_weights
from deepseek_train.train.step import train_step
from tests.dist.small_run import small_configs
from tests.harness import run_ranks

HOME = "dualpipe pp2 dp2 ep2"
LAYOUTS = {
    4: {
        HOME: ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"],
        "dp4 ep4": ["parallel.pp=1", "parallel.dp=4", "parallel.ep=4", "schedule=1f1b"],
        "dualpipe pp2 ep4 across mirrors": [
            "parallel.pp=2",
            "parallel.dp=2",
            "parallel.ep=4",
            "parallel.ep_across_mirrors=true",
        ],
        "zb_v pp4": ["parallel.pp=4", "parallel.dp=1", "parallel.ep=1", "schedule=zb_v"],
    },
    2: {"dualpipe pp2": ["parallel.pp=2", "parallel.dp=1", "parallel.ep=1"]},
    1: {"alone": ["parallel.pp=1", "parallel.dp=1", "parallel.ep=1", "schedule=1f1b"]},
    8: {"dualpipe pp4 dp2 ep2": ["parallel.pp=4", "parallel.dp=2", "parallel.ep=2"]},
}
COMMON = ["model.num_layers=8", "train.eval_microbatches=2", "train.microbatch_size=1"]
BEFORE, AFTER = 2, 2  # steps


@dataclass(frozen=True)
class Seen:
    saved: Path
    losses: list[float]
    consumed: int  # sequences


def job_of(config: RunConfig, rank: int, world: int) -> Job:
    return build(config, resolve_layout(config, world), Place(rank, world, rank, world, torch.device("cpu")))


def train(job: Job, progress: Progress, steps: int) -> tuple[Progress, list[float]]:
    losses = []
    for _ in range(steps):
        progress, metrics = train_step(job, progress, traced=False)
        losses.append(metrics.loss)
    return progress, losses


def begin(rank: int, world: int, config: RunConfig, root: Path) -> Seen:
    """Trains, saves, and trains on."""
    job = job_of(config, rank, world)
    progress, _ = train(job, Progress(), BEFORE)
    path = save(root / "begun", progress.step, checkpoint_of(job, progress, None), keep=1)
    progress, losses = train(job, progress, AFTER)
    save(root / "whole", progress.step, checkpoint_of(job, progress, None), keep=1)
    return Seen(Path(str(path)), losses, progress.cursor.consumed_sequences)


def move(rank: int, world: int, config: RunConfig, path: Path, root: Path) -> Seen:
    """Loads, saves what was loaded, and trains on."""
    job = job_of(config, rank, world)
    progress, _ = load_checkpoint(job, path)
    moved = save(root / "moved", progress.step, checkpoint_of(job, progress, None), keep=1)
    progress, losses = train(job, progress, AFTER)
    save(root / "ended", progress.step, checkpoint_of(job, progress, None), keep=1)
    return Seen(Path(str(moved)), losses, progress.cursor.consumed_sequences)


def tensors(path: Path) -> dict[str, bytes]:
    stored = StoredCheckpoint.open(path)
    return {name: stored.read(name).view(torch.uint8).numpy().tobytes() for name in stored.tensors}


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def configs(workplace: Path) -> dict[str, tuple[int, RunConfig]]:
    found = {}
    for world, layouts in LAYOUTS.items():
        made = small_configs(workplace, world, {name: [*values, *COMMON] for name, values in layouts.items()})
        found |= {name: (world, config) for name, config in made.items()}
    return found


@pytest.fixture(scope="module")
def begun(workplace: Path, configs: dict[str, tuple[int, RunConfig]]) -> Seen:
    world, config = configs[HOME]
    return run_ranks(begin, world, config, workplace)[0]


AWAY = [name for layouts in LAYOUTS.values() for name in layouts if name != HOME]


@pytest.mark.parametrize("name", AWAY)
def test_state_and_batches_are_the_same_in_any_layout(
    name: str, configs: dict[str, tuple[int, RunConfig]], begun: Seen, workplace: Path, tmp_path: Path
) -> None:
    world, config = configs[name]
    there = run_ranks(move, world, config, begun.saved, tmp_path)[0]
    expected = tensors(begun.saved)
    assert any(key.startswith("exp_avg_sq/") and any(value) for key, value in expected.items())
    assert tensors(there.saved) == expected
    assert there.consumed == begun.consumed
    # The same batches through other orders of addition (small_run's bound on what one step may differ).
    assert there.losses == pytest.approx(begun.losses, rel=2e-5)

    home_world, home = configs[HOME]
    back = run_ranks(move, home_world, home, there.saved, tmp_path / "back")[0]
    assert back.losses == begun.losses
    assert tensors(only(tmp_path / "back" / "ended")) == tensors(only(workplace / "whole"))


def take_weights(rank: int, world: int, config: RunConfig, path: Path, root: Path) -> Path:
    job = job_of(config, rank, world)
    load_weights(job, path)
    return Path(str(save(root, 0, checkpoint_of(job, Progress(), None), keep=1)))


def test_a_new_run_begins_with_another_ones_weights(
    configs: dict[str, tuple[int, RunConfig]], begun: Seen, tmp_path: Path
) -> None:
    world, config = configs["dualpipe pp2"]
    path = run_ranks(take_weights, world, config, begun.saved, tmp_path)[0]
    before, now = tensors(begun.saved), tensors(path)
    assert now.keys() == before.keys()
    for name, value in now.items():
        kind, _, weight = name.partition("/")
        if kind in ("master", "router_bias"):
            assert value == before[name], name
        elif kind == "ema":  # averages begin with the weights
            assert value == before[f"master/{weight}"], name
        else:
            assert value == bytes(len(before[name])), name
