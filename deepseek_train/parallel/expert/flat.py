"""Flat dispatch: one all-to-all over the whole expert group, a token once to every rank that needs it.

Copies come home summed in the order of ``two_hop``: those of one node first, then nodes. Legend: see ``plan``; G nodes,
N tokens of this rank, S sent rows (by target rank, then token), Q (node, token) pairs.
"""

import torch

from deepseek_train.parallel.expert.announce import Told, check_headers
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.parallel.expert.journey import Hop, Journey, Sum, WireFormats
from deepseek_train.parallel.expert.plan import DispatchPlan, assign, count_local, on_host, places, targets


def plan_flat(
    told: Told, num_tokens: int, num_experts: int, group: ExpertGroup, formats: WireFormats
) -> DispatchPlan:
    """The plan of this rank. Raises RoutingFault."""
    size, per_rank, capacity = group.size, num_experts // group.size, told.ids_PCK.shape[1]
    first = group.rank * per_rank
    needed_PC = targets(told.ids_PCK[group.rank], per_rank, 0, size).t()
    needed_GC = needed_PC.unflatten(0, (-1, group.node_size)).any(1)
    here_PC = targets(told.ids_PCK, per_rank, group.rank, 1).squeeze(-1)
    header, rows_E, send, receive, pairs_G = on_host(
        told.header_P2,
        count_local(told.ids_PCK, first, per_rank),
        needed_PC.sum(1),
        here_PC.sum(1),
        needed_GC.sum(1),
    )
    check_headers(header, num_experts)

    sent_S = places(needed_PC, sum(send))  # flat in [P, C]
    token_S = sent_S % capacity
    pair_GC = needed_GC.flatten().cumsum(0) - 1
    pair_S = pair_GC[sent_S // (capacity * group.node_size) * capacity + token_S]
    token_Q = places(needed_GC, sum(pairs_G)) % capacity
    hop = Hop(Among.ALL, token_S, (Sum(pair_S, sum(pairs_G)), Sum(token_Q, num_tokens)), send, receive)

    arriving_R = places(here_PC, sum(receive))
    rows_R = torch.arange(len(arriving_R), device=arriving_R.device)  # they lie in that order
    arrivals = assign(told.ids_PCK.flatten(0, 1)[arriving_R], rows_R, first, rows_E)
    remote = sum(pairs_G) - pairs_G[group.node]
    journey = Journey((hop,), group, formats, remote)
    return DispatchPlan(num_tokens, arrivals, journey, journey.home())
