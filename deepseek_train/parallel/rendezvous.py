"""Ranks meet: torch.distributed from the environment, and one clear message where they do not.

Three ways to be started, all the same afterwards:

- ``cli.launch_local`` set ``DEEPSEEK_TRAIN_STORE``: a FileStore, no port is used;
- ``torchrun`` set ``MASTER_ADDR`` and ``MASTER_PORT``: torch's ``env://``;
- nobody set ``RANK`` and ``WORLD_SIZE``: one process, a group of one.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    FileStore,
    HashStore,
    PrefixStore,
    Store,
    distributed_c10d,
    rendezvous,
)

ATTEMPTS = 3  # to connect, once all have met: some networks lose a connection at times
STORE_VARIABLE = "DEEPSEEK_TRAIN_STORE"  # path of the FileStore all local ranks share


class RendezvousError(RuntimeError):
    """The ranks of this run did not meet; the message says what, where and what to do."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this node
    local_world_size: int
    device: torch.device


def place_from_environment(device: Literal["cpu", "cuda"], expected_world_size: int | None = None) -> Place:
    """Read the launcher's variables. Nothing is connected yet.

    ``expected_world_size`` is what the layout needs (pp x dp). Raises ``RendezvousError`` if the launcher
    started another number of ranks, left variables out, or put more ranks on this node than it has GPUs.
    """
    rank, world_size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise RendezvousError(
            "only one of RANK and WORLD_SIZE is set in the environment. Start with torchrun, which sets "
            "both, or unset it."
        )
    if not 0 <= rank < world_size:
        raise RendezvousError(
            f"RANK={rank} is not within WORLD_SIZE={world_size}. Start with torchrun, or unset both."
        )
    if expected_world_size is not None and world_size != expected_world_size:
        raise RendezvousError(
            f"the layout needs {expected_world_size} ranks (parallel.pp x parallel.dp), but {world_size} "
            f"were started (WORLD_SIZE). Start {expected_world_size} (torchrun --nnodes x --nproc-per-node), "
            "or change parallel.pp and parallel.dp."
        )
    local_rank = _integer("LOCAL_RANK", 0)
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise RendezvousError(
            f"rank {rank} is number {local_rank} on this node, which has {torch.cuda.device_count()} GPUs. "
            "Start at most one rank per GPU (torchrun --nproc-per-node), or set cluster.device=cpu."
        )
    where = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    return Place(rank, world_size, local_rank, _integer("LOCAL_WORLD_SIZE", 1), where)


def join(
    device: Literal["cpu", "cuda"],
    expected_world_size: int | None = None,
    rendezvous_seconds: float = 120,
    timeout_seconds: float = 600,
) -> Place:
    """Initialise torch.distributed: gloo on CPUs; NCCL beside gloo (for tensors on CPUs) on GPUs.

    ``rendezvous_seconds`` is the patience until all ranks have met, and until they have connected, which is tried
    three times; ``timeout_seconds`` that of every collective afterwards. Raises ``RendezvousError``. Ends with
    ``dist.destroy_process_group()``.
    """
    place = place_from_environment(device, expected_world_size)
    store = _meet(place, timedelta(seconds=rendezvous_seconds))
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    errors = []
    for attempt in range(ATTEMPTS):
        error = _connect(place, PrefixStore(f"attempt{attempt}", store), rendezvous_seconds)
        if error is None:
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds))
            return place
        errors.append(error)
    raise RendezvousError(
        f"rank {place.rank} met the others but could not connect to them, {ATTEMPTS} times: {errors[-1]}. On "
        "several nodes name the network interface they share (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), "
        "and open its ports."
    )


def _connect(place: Place, store: Store, patience_seconds: float) -> str | None:
    """One attempt, of all ranks together: it counts when every rank has connected. Returns what went wrong, the same
    on all ranks. ``store``: of this attempt; addresses of an earlier one lead nowhere."""
    patience = timedelta(seconds=patience_seconds)
    try:
        dist.init_process_group(
            "gloo" if place.device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=patience,
            device_id=place.device if place.device.type == "cuda" else None,
        )
    except RuntimeError as error:
        store.set("failure", f"rank {place.rank}: {_first_line(error)}")
    if store.add("over", 1) == place.world_size:  # nobody runs ahead into the next attempt
        store.set("outcome", store.get("failure").decode() if store.check(["failure"]) else "")
    try:
        store.wait(["outcome"], 2 * patience)
        outcome = store.get("outcome").decode()
    except RuntimeError as error:  # a rank has gone meanwhile
        outcome = _first_line(error)
    if not outcome:
        return None
    if dist.is_initialized():
        dist.destroy_process_group()
    else:
        # Groups find each other by names that count them; destroying one starts the count anew, a failure does not.
        distributed_c10d._world.group_count = 0
    return outcome


def _meet(place: Place, patience: timedelta) -> Store:
    """A store on which every rank has been seen."""
    if path := os.environ.get(STORE_VARIABLE):
        store: Store = FileStore(path, place.world_size)
        where = f"the file {path}"
    elif "RANK" not in os.environ:
        return HashStore()
    else:
        store = _torchrun_store(place, patience)
        where = _address()
    store = PrefixStore("deepseek_train", store)
    store.set(f"here/{place.rank}", "")
    keys = [f"here/{rank}" for rank in range(place.world_size)]
    try:
        store.wait(keys, patience)
    except RuntimeError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise RendezvousError(
            f"rank {place.rank} waited {patience.total_seconds():g} s at {where}; of {place.world_size} "
            f"ranks these did not come: {', '.join(missing)}. See why they ended or never started, or wait "
            "longer (cluster.rendezvous_seconds)."
        ) from error
    return store


def _torchrun_store(place: Place, patience: timedelta) -> Store:
    try:
        store: Store = next(rendezvous("env://", timeout=patience))[0]
    except ValueError as error:  # a variable is missing
        raise RendezvousError(
            f"{_first_line(error)}. Start with torchrun, or unset RANK and WORLD_SIZE."
        ) from error
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise RendezvousError(
                f"the port of {_address()} is taken by another process. Choose another one: "
                "torchrun --master-port (MASTER_PORT), or 0 with --standalone."
            ) from error
        raise RendezvousError(
            f"rank {place.rank} of {place.world_size} waited {patience.total_seconds():g} s at {_address()} "
            f"and did not meet all others: {_first_line(error)}. See that every node was started with the "
            "same address and port and reaches it, or wait longer (cluster.rendezvous_seconds)."
        ) from error
    return store


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} (MASTER_ADDR:MASTER_PORT)"


def _integer(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise RendezvousError(f"{variable}={text} in the environment is not a whole number.") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
