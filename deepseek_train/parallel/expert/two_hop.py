"""Node-limited two-hop dispatch (V3 report section 3.2.2): a token crosses once to each node that needs it, to the rank
with its own rank's place there, and fans out from there to the ranks of that node.

On the way home the results of one node are summed at that rank, and only the sum crosses. Legend: see ``plan``; G
nodes, L ranks of a node, N tokens of this rank, S sent rows, H rows held after the first hop (by source node, token).
"""

from deepseek_train.parallel.expert.announce import Told, check_headers
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.parallel.expert.journey import Hop, Journey, Sum, WireFormats
from deepseek_train.parallel.expert.plan import DispatchPlan, assign, count_local, on_host, places, targets


def plan_two_hop(
    told: Told, num_tokens: int, num_experts: int, group: ExpertGroup, formats: WireFormats
) -> DispatchPlan:
    """The plan of this rank. Raises RoutingFault."""
    nodes, node_size, capacity = group.num_nodes, group.node_size, told.ids_PCK.shape[1]
    per_rank = num_experts // group.size
    first = group.rank * per_rank
    ids_GLCK = told.ids_PCK.unflatten(0, (nodes, node_size))
    # Of this rank's tokens; of the tokens it hands on, which come from its place in every node; of those it computes.
    needed_GC = targets(told.ids_PCK[group.rank], per_rank * node_size, 0, nodes).t()
    passing_GCL = targets(ids_GLCK[:, group.place], per_rank, group.node * node_size, node_size)
    passing_LGC, held_GC = passing_GCL.permute(2, 0, 1), passing_GCL.any(-1)
    here_GLC = targets(ids_GLCK, per_rank, group.rank, 1).squeeze(-1)
    header, rows_E, across, arriving, out, coming = on_host(
        told.header_P2,
        count_local(told.ids_PCK, first, per_rank),
        needed_GC.sum(1),
        held_GC.sum(1),
        passing_LGC.sum((1, 2)),
        here_GLC.sum((0, 2)),
    )
    check_headers(header, num_experts)

    token_S = places(needed_GC, sum(across)) % capacity
    between = Hop(Among.NODES, token_S, (Sum(token_S, num_tokens),), across, arriving)
    held_in_order = held_GC.flatten().cumsum(0) - 1
    held_S = held_in_order[places(passing_LGC, sum(out)) % (nodes * capacity)]
    within = Hop(Among.NODE, held_S, (Sum(held_S, sum(arriving)),), out, coming)

    # Rows arrive by the rank that handed them on (its place is that of their source), then source node, then token.
    source_R = places(here_GLC, sum(coming))
    row_LGC = here_GLC.transpose(0, 1).flatten().cumsum(0).unflatten(0, (node_size, nodes, capacity)) - 1
    row_R = row_LGC.transpose(0, 1).flatten()[source_R]
    arrivals = assign(told.ids_PCK.flatten(0, 1)[source_R], row_R, first, rows_E)
    journey = Journey((between, within), group, formats, sum(across) - across[group.node])
    return DispatchPlan(num_tokens, arrivals, journey, journey.home())
