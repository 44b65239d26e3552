"""What is raced: a cluster's shape, and tokens routed as DeepSeek-V3 routes, with a node limit.

Legend: N tokens of a rank, D channels, K experts per token, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_train.parallel.expert.announce import TokenRouting

EXPERTS, TOP_K = 256, 8


@dataclass(frozen=True)
class Case:
    """``limit``: nodes a token may use; ``rate_mbit``: of each node's link."""

    nodes: int
    node_size: int
    limit: int
    tokens: int  # of each rank
    channels: int
    rate_mbit: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.node_size

    def __str__(self) -> str:
        return f"EP{self.ranks}: {self.nodes} x {self.node_size}, {self.limit} of {self.nodes} nodes"


# Half of the nodes, as V3 has it. Links so slow that they take the time, not this machine's two cores, which compute
# for all ranks: with links of 50 to 200 Mbit/s two hops reached 0.6 to 0.8 of what their bytes promise (docs/log.md).
CASES = (
    Case(2, 4, 1, 512, 1024, 40),
    Case(4, 2, 2, 512, 1024, 40),
    Case(2, 8, 1, 256, 1024, 25),
    Case(4, 4, 2, 256, 1024, 25),
    Case(4, 8, 2, 128, 1024, 20),
    Case(8, 8, 4, 64, 1024, 20),
)


def routed(case: Case, rank: int, seed: int) -> TokenRouting:
    """Random scores; the best ``limit`` nodes by the sum of their two best experts, then the best experts there."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    scores_NE = torch.rand(case.tokens, EXPERTS, generator=generator)
    of_nodes = scores_NE.unflatten(1, (case.nodes, -1)).topk(2, -1).values.sum(-1)
    kept = of_nodes.topk(case.limit, -1).indices
    closed = torch.ones(case.tokens, case.nodes, dtype=torch.bool).scatter_(1, kept, False)
    open_NE = scores_NE.masked_fill(closed.repeat_interleave(EXPERTS // case.nodes, 1), -1.0)
    ids_NK = open_NE.topk(TOP_K, -1).indices
    weights_NK = scores_NE.gather(1, ids_NK)
    return TokenRouting(ids_NK, weights_NK / weights_NK.sum(-1, keepdim=True))


def hidden(case: Case, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(7 + 1000 * seed + rank)
    return torch.randn(case.tokens, case.channels, generator=generator).bfloat16()
