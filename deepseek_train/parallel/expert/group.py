"""The ranks that share the experts of a layer, and the process groups in which their rows travel.

Forward and backward passes have groups of their own: in an overlapped pair the second hop of the one and the first of
the other start whenever what came before has arrived, in another order on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.distributed as dist

from deepseek_train.parallel.exchange import Peers
from deepseek_train.parallel.traffic import Traffic
from deepseek_train.spec.links import LinkClass
from deepseek_train.watch.whereabouts import Whereabouts


class Among(Enum):
    """Which ranks of an expert group exchange rows."""

    ALL = "all"
    NODES = "nodes"  # those with the same place in their node
    NODE = "node"  # those of one node


Lane = dict[Among, Peers]


@dataclass(frozen=True)
class ExpertGroup:
    """``size`` ranks, ``node_size`` consecutive ones on a node; rank p holds experts [p E / size, (p + 1) E / size)."""

    rank: int
    size: int
    node_size: int
    forward: Lane = field(default_factory=dict)
    backward: Lane = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    # Where hops are queued on CUDA: rows, and the router's decisions, which must not queue behind rows.
    rows_stream: torch.cuda.Stream | None = None
    plans_stream: torch.cuda.Stream | None = None
    where: Whereabouts = field(default_factory=Whereabouts.unseen)

    @property
    def num_nodes(self) -> int:
        return self.size // self.node_size

    @property
    def node(self) -> int:
        return self.rank // self.node_size

    @property
    def place(self) -> int:
        """In the node."""
        return self.rank % self.node_size

    @property
    def me(self) -> str:
        """For errors."""
        return f"expert rank {self.rank} of {self.size} on {self.num_nodes} node(s)"

    def lane(self, forward: bool) -> Lane:
        return self.forward if forward else self.backward


ALONE = ExpertGroup(rank=0, size=1, node_size=1)

CPU = torch.device("cpu")
NewGroup = Callable[[tuple[int, ...]], dist.ProcessGroup]


def make_expert_group(
    ranks: tuple[int, ...],
    rank: int,
    node_size: int,
    new_group: NewGroup,
    *,
    among: tuple[Among, ...],
    check_splits: bool = False,
    device: torch.device = CPU,
    where: Whereabouts | None = None,
) -> ExpertGroup:
    """The expert group of global ``rank`` among ``ranks``, with process groups for exchanges ``among`` some of them:
    two of each (collective). ``where``: is told of transfers."""
    if len(ranks) == 1:
        return ALONE
    me, traffic = ranks.index(rank), Traffic()
    node, place = me // node_size, me % node_size
    members = {
        Among.ALL: tuple(range(len(ranks))),
        Among.NODES: tuple(range(place, len(ranks), node_size)),
        Among.NODE: tuple(range(node * node_size, (node + 1) * node_size)),
    }

    def link(other: int) -> LinkClass:
        if other == me:
            return LinkClass.LOCAL
        return LinkClass.NODE if other // node_size == node else LinkClass.CROSS

    def lane() -> Lane:
        return {
            some: Peers(
                new_group(tuple(ranks[m] for m in members[some])),
                members[some].index(me),
                tuple(map(link, members[some])),
                traffic,
                check_splits,
            )
            for some in among
        }

    rows, plans = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
    watched = where or Whereabouts.unseen()
    return ExpertGroup(me, len(ranks), node_size, lane(), lane(), traffic, rows, plans, watched)
