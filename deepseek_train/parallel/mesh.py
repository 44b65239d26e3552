"""The layout's groups of ranks as process groups.

Every rank creates the same number of groups in the same order (a group of one where it has no part). Correctness
needs this: on NCCL with a bound device every ``new_group`` splits the world's communicator, so all ranks of the world
meet in each creation; on gloo the members of a group find each other by its name, which counts the creations.

No more groups than that: on gloo each has a thread that wakes a hundred times a second, which 64 ranks on two cores
feel; on NCCL each has buffers.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from deepseek_train.parallel.expert.group import CPU, Among, ExpertGroup, make_expert_group
from deepseek_train.parallel.p2p import Links
from deepseek_train.schedule.action import Placement
from deepseek_train.schedule.lower import all_queues
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.watch.whereabouts import Whereabouts


@dataclass(frozen=True)
class ReplicaGroup:
    """Ranks that hold the same copy of some weights: their gradients are summed, their optimizer state is sharded."""

    ranks: tuple[int, ...]
    group: dist.ProcessGroup


@dataclass(frozen=True)
class ParallelMesh:
    """This rank's place. ``dense`` and ``experts`` are by stage; stages with the same holders share a group."""

    layout: ParallelLayout
    rank: int
    links: Links
    expert_group: ExpertGroup
    dense: dict[int, ReplicaGroup]
    experts: dict[int, ReplicaGroup]
    embedding: ReplicaGroup | None  # None on ranks that hold no embedding

    @property
    def pp_rank(self) -> int:
        return self.layout.pp_rank(self.rank)

    @property
    def dp_rank(self) -> int:
        return self.layout.dp_rank(self.rank)


def make_mesh(
    layout: ParallelLayout,
    placement: Placement,
    rank: int,
    *,
    embeds: tuple[int, ...],
    ranks_per_node: int | None = None,
    two_hop: bool = False,
    check_splits: bool = False,
    timeout_seconds: float = 600,
    device: torch.device = CPU,
    where: Whereabouts | None = None,
) -> ParallelMesh:
    """Creates this rank's groups (collective). ``embeds``: the stages that hold the embedding; ``ranks_per_node``: of
    an expert group (None: not known, all count as one node); ``two_hop``: whether its rows take two hops;
    ``timeout_seconds``: the patience of every collective in these groups; ``where``: is told of
    transfers between experts."""
    mine = placement.stages_of(layout.pp_rank(rank))
    assert len({len(placement.stages_of(p)) for p in range(layout.pp)}) == 1, "unequal numbers of groups"
    sharers = {layout.pp_rank(other) for other in layout.expert_group(rank)}
    assert {placement.stages_of(p) for p in sharers} == {mine}, "experts shared by different stages"

    def group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
        timeout = timedelta(seconds=timeout_seconds)
        made: dist.ProcessGroup = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        return made

    def replicas(ranks: tuple[int, ...], existing: dict[int, ReplicaGroup]) -> ReplicaGroup:
        """Hands out the group that exists, and creates one even so: ranks of a pipeline keep their counts equal."""
        same = next((replica for replica in existing.values() if replica.ranks == ranks), None)
        if same is not None and layout.pp == 1:
            return same
        new = ReplicaGroup(ranks, group(ranks))
        return same or new

    pipeline = layout.pipeline_group(rank)
    queues = all_queues() if layout.pp > 1 else ()
    links = Links({queue: group(pipeline) for queue in queues}, pipeline, layout.pp_rank(rank))
    expert_group = make_expert_group(
        layout.expert_group(rank),
        rank,
        ranks_per_node or layout.ep,
        group,
        among=(Among.NODES, Among.NODE) if two_hop else (Among.ALL,),
        check_splits=check_splits,
        device=device,
        where=where,
    )

    # As many groups on every rank, although a mirrored pair's two stages share theirs.
    dense: dict[int, ReplicaGroup] = {}
    experts: dict[int, ReplicaGroup] = {}
    for stage in mine:
        holders = placement.holders_of(stage)
        dense[stage] = replicas(layout.dense_replicas(holders), dense)
        experts[stage] = replicas(layout.expert_replicas(holders, layout.ep_rank(rank)), experts)

    holders = tuple(sorted({p for stage in embeds for p in placement.holders_of(stage)}))
    holds = layout.pp_rank(rank) in holders
    embedding = replicas(layout.dense_replicas(holders) if holds else (rank,), dense)
    return ParallelMesh(layout, rank, links, expert_group, dense, experts, embedding if holds else None)
