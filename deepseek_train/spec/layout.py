"""Rank <-> coordinates: who holds what, on paper.

world = pp x dp with the data-parallel index innermost; expert-parallel groups are ``ep`` consecutive data-parallel
ranks, or, across mirrors, half as many of two pipeline ranks that hold the same stages; a node is ``gpus_per_node``
consecutive ranks (DESIGN section 5).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelLayout:
    """The grid of ranks. ``ep`` divides ``sharers``. ``mirrored``: expert groups lie on pipeline ranks p and pp-1-p
    (DualPipe's, which hold the same stages), half on each; ``pp`` and ``ep`` are even then."""

    pp: int
    dp: int
    ep: int
    mirrored: bool = False

    @property
    def world(self) -> int:
        return self.pp * self.dp

    @property
    def sharers(self) -> int:
        """Ranks that expert groups are cut from: with the same stages, of a pipeline rank or of it and its mirror."""
        return 2 * self.dp if self.mirrored else self.dp

    def rank_at(self, pp_rank: int, dp_rank: int) -> int:
        return pp_rank * self.dp + dp_rank

    def pp_rank(self, rank: int) -> int:
        return rank // self.dp

    def dp_rank(self, rank: int) -> int:
        return rank % self.dp

    def ep_rank(self, rank: int) -> int:
        sides, per_side = self._sides(rank)
        return sides.index(self.pp_rank(rank)) * per_side + self.dp_rank(rank) % per_side

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that run one pipeline, by pipeline rank."""
        return tuple(self.rank_at(p, self.dp_rank(rank)) for p in range(self.pp))

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that together hold all experts of a layer, by expert-parallel rank: the lower pipeline rank's first."""
        sides, per_side = self._sides(rank)
        first = self.dp_rank(rank) - self.dp_rank(rank) % per_side
        return tuple(self.rank_at(p, first + i) for p in sides for i in range(per_side))

    def _sides(self, rank: int) -> tuple[tuple[int, ...], int]:
        """The pipeline ranks that the expert group of ``rank`` lies on, and how many of its ranks are on each."""
        pp_rank = self.pp_rank(rank)
        if not self.mirrored:
            return (pp_rank,), self.ep
        mirror = self.pp - 1 - pp_rank
        return (min(pp_rank, mirror), max(pp_rank, mirror)), self.ep // 2

    def dense_replicas(self, holders: tuple[int, ...]) -> tuple[int, ...]:
        """Ranks with the same copy of a dense weight whose stage the pipeline ranks ``holders`` hold."""
        return tuple(self.rank_at(p, d) for p in holders for d in range(self.dp))

    def expert_replicas(self, holders: tuple[int, ...], ep_rank: int) -> tuple[int, ...]:
        """Ranks with the same copy of the experts of expert-parallel index ``ep_rank``."""
        return tuple(rank for rank in self.dense_replicas(holders) if self.ep_rank(rank) == ep_rank)


def ranks_per_node(ranks: tuple[int, ...], gpus_per_node: int) -> int | None:
    """How many of ``ranks`` each node they live on holds; None where not equally many, or not consecutive ones."""
    nodes = [rank // gpus_per_node for rank in ranks]
    size = nodes.count(nodes[0])
    regular = [nodes[i - i % size] for i in range(len(nodes))]
    return size if nodes == regular and len(set(nodes)) * size == len(nodes) else None


def expert_ranks_per_node(layout: ParallelLayout, gpus_per_node: int) -> int | None:
    """Ranks of an expert group on each of its nodes; None where that is not one number for all groups and nodes."""
    groups = {layout.expert_group(rank) for rank in range(layout.world)}
    sizes = {ranks_per_node(group, gpus_per_node) for group in groups}
    return sizes.pop() if len(sizes) == 1 else None
