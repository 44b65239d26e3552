"""Ranks that hold up the others by being slow: told by name, while the run goes on.

Compared is the time of computing phases alone, by the trace of a step: in a step's time all ranks are alike, for they
wait for each other. A rank is held against those that do the same work, the other replicas of its stages, or, where it
has none, against all.
"""

import statistics
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from deepseek_train.pipeline.trace import Trace
from deepseek_train.schedule.overlap import Lane
from deepseek_train.train.build import Job

SLOW = 2.0  # times as long as the others: less is noise, or an uneven cut of the layers


def warn_of_stragglers(job: Job, trace: Trace, step: int) -> None:
    """Compares the ranks in a traced step (collective); rank 0 warns of the slow ones."""
    world = dist.get_world_size()
    seconds = torch.zeros(world, dtype=torch.float64, device=job.place.device)
    seconds[job.place.rank] = sum(s.end - s.start for s in trace.phases if s.lane is Lane.COMPUTE)
    dist.all_reduce(seconds)
    stages = [job.placement.stages_of(job.layout.pp_rank(rank)) for rank in range(world)]
    if job.place.rank == 0:
        for rank, times in stragglers(seconds.tolist(), [tuple(sorted(some)) for some in stages]):
            print(
                f"warning: rank {rank} took {times:.1f} times as long as other ranks to compute step {step}: look at "
                "its machine (clocks, temperature, other processes)",
                file=sys.stderr,
                flush=True,
            )


def stragglers(seconds: Sequence[float], stages: Sequence[tuple[int, ...]]) -> list[tuple[int, float]]:
    """(rank, how many times as long as its like) of every slow rank. ``stages``: those of each rank."""
    found = []
    for rank, own in enumerate(seconds):
        others = [other for other in range(len(seconds)) if other != rank]
        alike = [other for other in others if stages[other] == stages[rank]] or others
        usual = statistics.median(seconds[other] for other in alike) if alike else own
        if own > SLOW * usual > 0:
            found.append((rank, own / usual))
    return found
