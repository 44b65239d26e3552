"""Whether ranks that must hold the same weights do: a flipped bit in memory or on a link trains on in silence.

A weight that differs is read by forward and backward of its own rank alone, and the next update writes all replicas
anew from the masters: so they are compared when a step's gradients are there and before its update. Router biases,
which nothing writes anew, are compared with them. What is held once (masters, moments) cannot be compared.

Legend: R replicas, N tensors.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.parallel.checksum import checksum
from deepseek_train.parallel.mesh import ReplicaGroup
from deepseek_train.train.build import Job


class ReplicaError(RuntimeError):
    """Replicas hold different bits: which tensors, on which ranks, at which step. The same on every rank."""


def check_replicas(job: Job, step: int) -> float:
    """Compares all that replicas hold (collective); the seconds it took. Raises ReplicaError on every rank where
    anything differs anywhere."""
    started = time.perf_counter()
    compared = [(one, one.gathered()) for one in _watched(job)]
    differs = torch.zeros((), dtype=torch.int64, device=job.place.device)
    for _, sums_RN in compared:
        differs += (sums_RN != sums_RN[0]).sum()
    dist.all_reduce(differs)
    if differs:  # the device is waited for once
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(
            everyone, [text for one, sums_RN in compared for text in one.findings(sums_RN)]
        )
        found = sorted({text for texts in everyone for text in texts})
        raise ReplicaError(
            "\n  ".join([f"step {step}: ranks that must hold the same bits do not.", *found])
            + "\nA processor, a memory or a link there is at fault. Start again, best without that machine: the run "
            "goes on from its last checkpoint."
        )
    return time.perf_counter() - started


@dataclass(frozen=True)
class _Watched:
    """Tensors that the same ranks hold."""

    replicas: ReplicaGroup
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def gathered(self) -> Tensor:
        """Checksums of all replicas, [R, N]."""
        sums_N = torch.stack([checksum(tensor) for tensor in self.tensors.values()])
        sums_RN = sums_N.new_empty(len(self.replicas.ranks) * len(sums_N))
        dist.all_gather_into_tensor(sums_RN, sums_N, group=self.replicas.group)
        return sums_RN.view(-1, len(sums_N))

    def findings(self, sums_RN: Tensor) -> list[str]:
        """One text for each tensor that differs."""
        columns = zip(self.tensors, sums_RN.T.tolist(), strict=True)
        return [f"{name}: {self._sides(sums_R)}" for name, sums_R in columns if len(set(sums_R)) > 1]

    def _sides(self, sums_R: list[int]) -> str:
        """Who holds what; the odd ones first."""
        counts = sorted(Counter(sums_R).items(), key=lambda one: (one[1], sums_R.index(one[0])))
        sides = []
        for value, _ in counts:
            ranks = [str(rank) for rank, its in zip(self.replicas.ranks, sums_R, strict=True) if its == value]
            sides.append(f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}")
        even = counts[-1][1] == counts[-2][1]
        return " against ".join(sides) + (" (no majority: either may be wrong)" if even else "")


def _watched(job: Job) -> list[_Watched]:
    """In the same order on all ranks of a group, because they list the same stages."""
    found: dict[tuple[tuple[int, ...], bool], _Watched] = {}
    for owned in job.weights:
        key = owned.replicas.ranks, owned.spec.expert
        found.setdefault(key, _Watched(owned.replicas)).tensors[owned.spec.name] = owned.weight
    for index, stage in job.stages.items():
        replicas = job.mesh.dense[index]
        for layer, router in stage.routers():
            one = found.setdefault((replicas.ranks, False), _Watched(replicas))
            one.tensors[f"router_bias/{layer}"] = router.bias
    return [one for one in found.values() if len(one.replicas.ranks) > 1]
