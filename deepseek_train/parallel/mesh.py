"""The layout's groups of ranks as process groups.

Every rank creates the same number of groups in the same order (a group of one where it has no part), so creation needs
no world-wide meeting and names agree between the members of a group.
"""

from dataclasses import dataclass

import torch.distributed as dist

from deepseek_train.parallel.exchange import ExpertGroup
from deepseek_train.parallel.p2p import Links
from deepseek_train.schedule.action import Placement
from deepseek_train.spec.layout import ParallelLayout


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
    layout: ParallelLayout, placement: Placement, rank: int, *, embeds: tuple[int, ...], check_splits: bool
) -> ParallelMesh:
    """Creates this rank's groups (collective). ``embeds``: the stages that hold the embedding."""
    pipeline = layout.pipeline_group(rank)
    links = Links(
        down=_group(pipeline),
        up=_group(pipeline),
        ranks=pipeline,
        me=layout.pp_rank(rank),
    )
    expert_group = ExpertGroup(
        _group(layout.expert_group(rank)), layout.ep_rank(rank), layout.ep, check_splits
    )

    mine = placement.stages_of(layout.pp_rank(rank))
    # Slots, not stages: every rank makes as many groups, and a mirrored pair's two stages share theirs.
    dense: dict[int, ReplicaGroup] = {}
    experts: dict[int, ReplicaGroup] = {}
    for slot in range(max(len(placement.stages_of(p)) for p in range(layout.pp))):
        holders = placement.holders_of(mine[slot])
        dense[mine[slot]] = _replicas(layout.dense_replicas(holders), dense)
        experts[mine[slot]] = _replicas(layout.expert_replicas(holders, layout.ep_rank(rank)), experts)

    holders = tuple(sorted({p for stage in embeds for p in placement.holders_of(stage)}))
    holds = layout.pp_rank(rank) in holders
    embedding = _replicas(layout.dense_replicas(holders) if holds else (rank,), dense)
    return ParallelMesh(layout, rank, links, expert_group, dense, experts, embedding if holds else None)


def _replicas(ranks: tuple[int, ...], existing: dict[int, ReplicaGroup]) -> ReplicaGroup:
    """Always creates a group, to keep counts equal between ranks, but hands out the one that exists."""
    group = _group(ranks)
    known = next((replica for replica in existing.values() if replica.ranks == ranks), None)
    return known or ReplicaGroup(ranks, group)


def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), use_local_synchronization=True)
