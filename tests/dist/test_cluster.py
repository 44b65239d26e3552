"""Nodes as network namespaces: what crosses the wire is counted and held to its rate, and nothing stays behind.

Where there can be no namespaces (no root, no iproute2), the same tests hold ``Cluster`` to a refusal that says so.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.cluster import (
    Cluster,
    ClusterUnavailable,
    NodeBytes,
    Sample,
    available,
    run_on_cluster,
    timed,
    wall,
    wire,
)
from benchmarks.cluster.nodes import NAMES
from tests.harness import RanksFailed

RATE = 100  # Mbit/s
PER_NODE = 2  # ranks
MESSAGE = 500_000  # bytes
OUT = (
    PER_NODE * PER_NODE * MESSAGE
)  # bytes that leave one of two nodes when every rank sends one to every rank


def on_a_cluster(test: Callable[[], None]) -> Callable[[], None]:
    """The test itself where there can be a cluster; elsewhere, that one is refused for the reason given."""

    @functools.wraps(test)
    def either() -> None:
        reason = available()
        if reason is None:
            test()
            return
        with pytest.raises(ClusterUnavailable) as refusal, Cluster(2):
            pass
        assert nameless(str(refusal.value)) == nameless(reason)

    return either


def nameless(reason: str) -> str:
    return re.sub(r"cluster\d+-\w+", "cluster", reason)


def namespaces(cluster: Cluster) -> list[str]:
    return [path.name for path in NAMES.iterdir() if path.name.startswith(cluster.prefix)]


def exchange(rank: int, world: int, peers: str) -> Sample:
    """Every rank sends a message to "all" ranks, or "near" ones: those of its node."""
    sizes = [
        MESSAGE if peers == "all" or other // PER_NODE == rank // PER_NODE else 0 for other in range(world)
    ]
    sent = torch.full((sum(sizes),), rank, dtype=torch.uint8)
    received = torch.full_like(sent, 255)
    sample = timed(lambda: dist.all_to_all_single(received, sent, sizes, sizes))
    assert received.tolist() == [other for other, size in enumerate(sizes) for _ in range(size)]
    return sample


@on_a_cluster
def test_the_wire_carries_and_holds_back_what_leaves_a_node() -> None:
    with Cluster(2, rate_mbit=RATE) as cluster:
        before = cluster.counters()
        samples = run_on_cluster(exchange, 2 * PER_NODE, cluster, "all")
        passed = [after - first for after, first in zip(cluster.counters(), before, strict=True)]
        assert cluster.dropped() == 0
    measured = wire(samples, 2)
    for node, outside in zip(measured, passed, strict=True):
        for inside, whole in ((node.tx, outside.tx), (node.rx, outside.rx)):
            assert OUT <= inside <= whole <= 1.1 * OUT
    assert wall(samples) >= 0.8 * OUT * 8 / (RATE * 1e6)


@on_a_cluster
def test_what_stays_in_a_node_is_off_the_wire() -> None:
    with Cluster(2, rate_mbit=10) as cluster:
        samples = run_on_cluster(exchange, 2 * PER_NODE, cluster, "near")
    assert all(max(node.tx, node.rx) < 0.02 * OUT for node in wire(samples, 2))
    assert wall(samples) < 0.5 * OUT * 8 / 10e6


def fails_on_the_other_node(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("lost")
    dist.barrier()


@on_a_cluster
def test_an_error_of_a_rank_comes_back_and_the_namespaces_go() -> None:
    cluster = Cluster(2)
    with pytest.raises(RanksFailed, match=r"--- rank 1 raised[\s\S]*KeyError: 'lost'"), cluster:
        run_on_cluster(fails_on_the_other_node, 2, cluster)
    assert namespaces(cluster) == []


def interrupted_with(cluster: Cluster) -> None:
    assert len(namespaces(cluster)) == 3
    raise KeyboardInterrupt


@on_a_cluster
def test_ctrl_c_leaves_nothing() -> None:
    cluster, other = Cluster(2), Cluster(1)
    with other:
        with pytest.raises(KeyboardInterrupt), cluster:
            interrupted_with(cluster)
        assert namespaces(cluster) == []
        assert len(namespaces(other)) == 2, "two clusters at a time, and one ends without the other"


def test_without_iproute2_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert available() == "there is no `ip` on the PATH: install iproute2"


def test_a_kernel_without_token_buckets_is_a_reason_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ip`` as it is here, if at all; a ``tc`` that knows no tbf."""
    tc = tmp_path / "tc"
    tc.write_text("#!/bin/sh\necho 'Error: Specified qdisc kind is unknown.' >&2\nexit 2\n")
    tc.chmod(0o755)
    possible = available() is None
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = Cluster(2)
    with pytest.raises(ClusterUnavailable) as refusal, cluster:
        pass
    if possible:
        assert re.search(
            r"^`tc .* tbf .*` failed: Error: Specified qdisc kind is unknown.$", str(refusal.value)
        )
        assert namespaces(cluster) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_nodes": 0}, r"num_nodes=0\): must be 1 to 200"),
        ({"num_nodes": 2, "rate_mbit": 0}, r"rate_mbit=0\): must be above 0"),
        ({"num_nodes": 2, "rate_mbit": 1, "burst_ms": 20}, "a burst of 2500 bytes; must be 18000 or more"),
    ],
)
def test_what_makes_no_cluster(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cluster(**settings)


def test_ranks_are_spread_evenly() -> None:
    with pytest.raises(ValueError, match="must be a multiple of the 2 nodes"):
        run_on_cluster(fails_on_the_other_node, 3, Cluster(2))


def test_one_figure_of_all_ranks() -> None:
    samples = [Sample(1.0 + rank / 10, 2.0 - rank / 10, NodeBytes(rank, 10 * rank)) for rank in range(4)]
    assert wall(samples) == 1.0
    assert wire(samples, 2) == [NodeBytes(0, 0), NodeBytes(2, 20)]
