"""Ranks meet by file, by torchrun's variables, or alone; when they do not, it is said who, where and what to do."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepseek_train.parallel.rendezvous import RendezvousError, join, place_from_environment
from tests.harness import run_ranks

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*LAUNCHER_VARIABLES, "DEEPSEEK_TRAIN_STORE"):
        monkeypatch.delenv(variable, raising=False)


def joined(rank: int, world_size: int, variables: dict[str, str], patience: float) -> tuple[float, int, str]:
    os.environ.update(variables, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    place = join("cpu", world_size, rendezvous_seconds=patience)
    x = torch.tensor(float(rank + 1))
    dist.all_reduce(x)
    return x.item(), place.rank, dist.get_backend()


def test_meet_at_a_file(tmp_path: Path) -> None:
    variables = {"DEEPSEEK_TRAIN_STORE": str(tmp_path / "store")}
    assert run_ranks(joined, 4, variables, 20.0, group=False) == [(10.0, rank, "gloo") for rank in range(4)]


def test_meet_by_the_variables_of_torchrun() -> None:
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    assert run_ranks(joined, 3, variables, 30.0, group=False) == [(6.0, rank, "gloo") for rank in range(3)]


def alone(rank: int, world_size: int) -> tuple[int, int, float]:
    place = join("cpu", expected_world_size=1)
    x = torch.tensor(2.0)
    dist.all_reduce(x)
    return place.world_size, dist.get_world_size(), x.item()


def test_alone_is_a_group_of_one() -> None:
    assert run_ranks(alone, 1, group=False) == [(1, 1, 2.0)]


def late(rank: int, world_size: int, variables: dict[str, str]) -> tuple[str, float]:
    """Join a world that is one rank larger than what was started."""
    os.environ.update(variables, RANK=str(rank), WORLD_SIZE=str(world_size + 1))
    began = time.monotonic()
    try:
        join("cpu", rendezvous_seconds=1)
    except RendezvousError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    for message, seconds in run_ranks(late, 2, {"DEEPSEEK_TRAIN_STORE": store}, group=False):
        assert f"waited 1 s at the file {store}; of 3 ranks these did not come: 2." in message
        assert "cluster.rendezvous_seconds" in message
        assert seconds < 5


def test_waiting_at_an_address_ends_with_one_message() -> None:
    port = _free_port()
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for message, seconds in run_ranks(late, 2, variables, group=False):
        assert f"at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)" in message
        assert "cluster.rendezvous_seconds" in message
        assert seconds < 10


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(RendezvousError, match=f"127.0.0.1:{port}.*is taken.*MASTER_PORT"):
            join("cpu", rendezvous_seconds=2)


def test_another_number_of_ranks_is_refused_before_anything_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(RendezvousError, match="layout needs 8 ranks.*but 6 were started"):
        join("cpu", expected_world_size=8)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RANK": "1"}, "only one of RANK and WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not within WORLD_SIZE=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one in the environment is not a whole number"),
    ],
)
def test_broken_variables_are_named(
    variables: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(RendezvousError, match=complaint):
        place_from_environment("cpu")


def test_a_missing_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RendezvousError, match="MASTER_ADDR.*Start with torchrun"):
        join("cpu")


def test_more_ranks_than_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"RANK": "0", "WORLD_SIZE": "99", "LOCAL_RANK": "98"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(RendezvousError, match="number 98 on this node, which has .* GPUs"):
        place_from_environment("cuda")


def flaky(
    rank: int, world_size: int, variables: dict[str, str], failures: int, broken: int
) -> tuple[float, str, int]:
    """Joins, though the connections of rank ``broken`` fail so many times; then uses a group made after it."""
    os.environ.update(variables, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    init, tried = dist.init_process_group, []

    def unreliable(*args: Any, **kwargs: Any) -> None:
        tried.append(kwargs["timeout"])
        if rank == broken and len(tried) <= failures:
            raise RuntimeError("Gloo connectFullMesh failed with Connection refused\nmore")
        init(*args, **kwargs)

    dist.init_process_group = unreliable
    try:
        join("cpu", world_size, rendezvous_seconds=2, timeout_seconds=33)
    except RendezvousError as error:
        return 0.0, str(error), len(tried)
    group = dist.new_group([0, 1], use_local_synchronization=True)
    x = torch.tensor(float(rank + 1))
    dist.all_reduce(x, group=group)
    dist.barrier()
    return x.item(), "", len(tried)


def test_a_connection_that_fails_is_tried_again_by_all_ranks(tmp_path: Path) -> None:
    store = {"DEEPSEEK_TRAIN_STORE": str(tmp_path / "store")}
    assert run_ranks(flaky, 2, store, 2, 1, group=False, timeout=60) == [(3.0, "", 3)] * 2


def test_three_failures_are_told_by_all_ranks(tmp_path: Path) -> None:
    store = {"DEEPSEEK_TRAIN_STORE": str(tmp_path / "store")}
    for _, message, tried in run_ranks(flaky, 2, store, 3, 0, group=False, timeout=60):
        assert tried == 3
        assert "could not connect to them, 3 times: rank" in message
        assert "GLOO_SOCKET_IFNAME" in message


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
