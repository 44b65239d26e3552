"""What was asked of the machines; a part of ``config.schema``."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WatchdogConfig:
    """Who looks for ranks that hang or lag behind."""

    enabled: bool = True
    # Without progress of a rank, in a step; then it reports and ends. While one is in a phase that may be long (its
    # first step, a search, saving) it is nine tenths of cluster.timeout_seconds.
    hang_seconds: float = 300.0
    straggler_every: int = 100  # steps between two comparisons of all ranks' computing times; 0: never


@dataclass(frozen=True)
class ClusterConfig:
    """The machines."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus_per_node: int = 8
    timeout_seconds: int = 600  # of every collective
    rendezvous_seconds: int = 120  # until all ranks have met
    max_restarts: int = 0  # of local ranks that failed, from the last checkpoint; torchrun has --max-restarts
    watchdog: WatchdogConfig = WatchdogConfig()
    threads_per_rank: int = 1  # CPU threads of one rank when the device is cpu
    # BF16 TFLOP/s of one GPU without sparsity, for MFU. None: known for H100, H200 and H800 (SXM), else no MFU is told.
    peak_tflops: float | None = None
