"""A cluster of nodes on one machine: network namespaces with shaped links, ranks inside them, their bytes and time."""

from benchmarks.cluster.meter import Sample, timed, wall, wire
from benchmarks.cluster.nodes import Cluster, ClusterUnavailable, NodeBytes, available
from benchmarks.cluster.ranks import run_on_cluster

__all__ = [
    "Cluster",
    "ClusterUnavailable",
    "NodeBytes",
    "Sample",
    "available",
    "run_on_cluster",
    "timed",
    "wall",
    "wire",
]
