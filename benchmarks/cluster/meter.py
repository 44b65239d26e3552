"""Seconds and bytes on the wire of one region that all ranks go through together.

Every rank calls ``timed(body)`` and returns its ``Sample``; ``wall`` and ``wire`` make one figure of all of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from benchmarks.cluster.nodes import INTERFACE, NodeBytes

# Of this process's namespace. Not /sys/class/net: that shows the namespace it was mounted in, the machine's own.
DEVICES = Path("/proc/self/net/dev")


@dataclass(frozen=True)
class Sample:
    """One rank's view of a region. All ranks read the same clock: perf_counter is the system's CLOCK_MONOTONIC."""

    start: float  # seconds
    end: float
    wire: NodeBytes  # of its node, within the region


def own_counters() -> NodeBytes:
    """Of the link of the node that this process is on, since the link was made."""
    for line in DEVICES.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            fields = numbers.split()
            return NodeBytes(tx=int(fields[8]), rx=int(fields[0]))
    raise RuntimeError(f"there is no {INTERFACE} in {DEVICES}: this process is on no node of a Cluster")


def timed(body: Callable[[], object]) -> Sample:
    """Run ``body`` on all ranks at once. The bytes include its closing barrier's (some kB), the time does not."""
    dist.barrier()
    before = own_counters()
    dist.barrier()  # nobody sends before all have read
    start = time.perf_counter()
    body()
    end = time.perf_counter()
    dist.barrier()  # what has been received has been counted
    after = own_counters()
    dist.barrier()
    return Sample(start, end, after - before)


def wall(samples: Sequence[Sample]) -> float:
    """Seconds from the first rank's start to the last one's end. ``samples``: of one region, by rank."""
    return max(sample.end for sample in samples) - min(sample.start for sample in samples)


def wire(samples: Sequence[Sample], num_nodes: int) -> list[NodeBytes]:
    """By node, as its first rank read them. ``samples``: of one region, by rank."""
    return [sample.wire for sample in samples[:: len(samples) // num_nodes]]
