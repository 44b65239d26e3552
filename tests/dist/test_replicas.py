"""One bit of one replica, flipped: every rank says which tensor, which rank and which step, before a weight moves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_train.config.schema import RunConfig
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.train.build import Job, build
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.replicas import ReplicaError, check_replicas
from deepseek_train.train.state import Progress
from deepseek_train.train.step import train_step
from tests.dist.small_run import small_configs
from tests.harness import run_ranks

LAYOUTS = {
    4: [
        "parallel.pp=2",
        "parallel.dp=2",
        "parallel.ep=2",
        "train.eval_microbatches=4",
        "train.check_replicas_every=2",
    ],
    2: ["parallel.pp=2", "parallel.dp=1", "parallel.ep=1", "train.check_replicas_every=2"],
}


def config_of(folder: Path, world: int) -> RunConfig:
    return small_configs(folder, world, {"": LAYOUTS[world]})[""]


def tensor_of(job: Job, name: str) -> Tensor:
    biases = {f"router_bias/{layer}": bias for layer, bias in job.router_biases()}
    return biases[name] if name in biases else {o.spec.name: o.weight.data for o in job.weights}[name]


def flip(tensor: Tensor, place: int, bit: int) -> None:
    tensor.view(-1).view(torch.int32)[place] ^= 1 << bit


def flipped(rank: int, world_size: int, config: RunConfig, cases: list[tuple[str, int, int]]) -> list[str]:
    """For each (tensor, rank, bit): what is said of the bit flipped there. Untouched, nothing is said."""
    place = Place(rank, world_size, rank, world_size, torch.device("cpu"))
    job, said = build(config, resolve_layout(config, world_size), place), []
    check_replicas(job, 0)
    for step, (name, victim, bit) in enumerate(cases, start=1):
        if rank == victim:
            flip(tensor_of(job, name), 5, bit)
        with pytest.raises(ReplicaError) as raised:
            check_replicas(job, step)
        if rank == victim:
            flip(tensor_of(job, name), 5, bit)
        assert check_replicas(job, step) > 0.0
        said.append(str(raised.value).splitlines()[1].strip())
        assert str(raised.value).startswith(f"step {step}: ranks that must hold the same bits do not.")
    return said


def test_a_flipped_bit_is_told_on_every_rank(tmp_path: Path) -> None:
    """PP2 DualPipe x DP2 x EP2: four replicas of what is dense, two (mirrors) of each expert."""
    cases = [
        ("layers.0.attention.kv_a", 2, 0),
        ("head", 1, 30),
        ("layers.3.experts.down", 1, 23),
        ("router_bias/3", 0, 3),
        ("embed", 3, 31),
    ]
    everyone = run_ranks(flipped, 4, config_of(tmp_path, 4), cases)
    assert all(said == everyone[0] for said in everyone)
    assert everyone[0] == [
        "layers.0.attention.kv_a: rank 2 against ranks 0, 1, 3",
        "head: rank 1 against ranks 0, 2, 3",
        "layers.3.experts.down: rank 1 against rank 3 (no majority: either may be wrong)",
        "router_bias/3: rank 0 against ranks 1, 2, 3",
        "embed: rank 3 against ranks 0, 1, 2",
    ]


def mirrored(rank: int, world_size: int, config: RunConfig) -> str:
    """A whole run's steps: due at the second one, flipped in it, found before its update."""
    place = Place(rank, world_size, rank, world_size, torch.device("cpu"))
    job = build(config, resolve_layout(config, world_size), place)
    progress, metrics = train_step(job, Progress(), traced=False)
    assert metrics.replica_check_seconds is None
    progress, metrics = train_step(job, progress, traced=False)
    assert metrics.replica_check_seconds is not None
    progress, _ = train_step(job, progress, traced=False)
    if rank == 1:
        flip(tensor_of(job, "layers.2.ffn_norm"), 7, 1)
    weights = [one.weight.detach().clone() for one in job.weights]
    with pytest.raises(ReplicaError) as raised:
        train_step(job, progress, traced=False)
    assert all(torch.equal(one.weight, was) for one, was in zip(job.weights, weights, strict=True))
    return str(raised.value)


def test_a_mirrored_stage_of_dualpipe_is_a_replica(tmp_path: Path) -> None:
    one, other = run_ranks(mirrored, 2, config_of(tmp_path, 2))
    assert one == other
    assert one.startswith("step 4: ")
    assert "layers.2.ffn_norm: rank" in one
    assert "no majority" in one
