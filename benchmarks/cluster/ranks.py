"""Ranks on the nodes of a cluster: ``results = run_on_cluster(fn, world_size, cluster, *args)``."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from benchmarks.cluster.nodes import Cluster
from tests.harness import run_ranks


def run_on_cluster(
    fn: Callable[..., Any], world_size: int, cluster: Cluster, *args: Any, timeout: float = 60
) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` on gloo ranks spread over the nodes; returns its results, by rank.

    Rank r is on node ``r // (world_size / num_nodes)``. Otherwise as ``tests.harness.run_ranks``, errors too.
    """
    if world_size % cluster.num_nodes:
        raise ValueError(
            f"run_on_cluster(world_size={world_size}): must be a multiple of the {cluster.num_nodes} nodes"
        )
    with tempfile.TemporaryDirectory(prefix="cluster_") as folder:
        store = str(Path(folder) / "store")  # a file: all namespaces share the file system
        return run_ranks(
            _on_its_node, world_size, cluster, store, timeout, fn, args, timeout=timeout, group=False
        )


def _on_its_node(
    rank: int,
    world_size: int,
    cluster: Cluster,
    store: str,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    cluster.enter(rank * cluster.num_nodes // world_size)
    dist.init_process_group(
        "gloo",
        store=FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout + 30),  # the harness ends a hanging rank, and knows where it stood
    )
    return fn(rank, world_size, *args)
