"""Where each token of a micro-batch goes in one MoE layer: computed once, used by dispatch, combine and both backwards.

Legend: N local tokens, K experts per token, P expert-parallel ranks, S rows sent (a token once per rank that needs
it, ordered by rank, then token), R rows received (ordered by source rank, then source token), A assignments of
received rows to local experts (ordered by expert, then row).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepseek_train.parallel.exchange import Exchange, ExpertGroup, exchange_counts


@dataclass(frozen=True)
class TokenRouting:
    """The router's decision: which experts, with which weights (differentiable)."""

    expert_ids_NK: Tensor
    weights_NK: Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Row maps of one micro-batch in one MoE layer. ``x_to_y`` reads: for each x, its y."""

    num_tokens: int
    sent_to_token_S: Tensor
    send_P: list[int]  # rows to each rank
    receive_P: list[int]  # rows from each rank
    assignment_to_row_A: Tensor  # received row
    assignment_to_slot_A: Tensor  # flat index into the received [R, K] routing weights
    rows_E: tuple[int, ...]  # assignments of each local expert

    @property
    def num_received(self) -> int:
        return sum(self.receive_P)


@torch.no_grad()
def make_plan(expert_ids_NK: Tensor, num_experts: int, group: ExpertGroup) -> DispatchPlan:
    """Plan for tokens routed to ``expert_ids_NK``; rank p holds experts [p E/P, (p+1) E/P). Collective over the group.
    Dropless: every assignment is served. Waits for the device: row counts are needed on the host."""
    num_tokens, top_k = expert_ids_NK.shape
    per_rank = num_experts // group.size
    if group.size == 1:
        sent_to_token_S = torch.arange(num_tokens, device=expert_ids_NK.device)
        send_P, receive_P, ids_RK = [num_tokens], [num_tokens], expert_ids_NK
    else:
        needed_NP = torch.zeros(num_tokens, group.size, dtype=torch.bool, device=expert_ids_NK.device)
        needed_NP.scatter_(1, expert_ids_NK // per_rank, True)
        sent_to_token_S = needed_NP.t().nonzero()[:, 1]
        counts_P = needed_NP.sum(0)
        send_P, receive_P = counts_P.tolist(), exchange_counts(counts_P, group)
        way = Exchange(send_P, receive_P, replace(group, group=group.plans or group.group))
        (ids_RK,) = way.start((expert_ids_NK[sent_to_token_S],)).wait()
    local_ids = ids_RK.flatten() - group.rank * per_rank
    slots = ((local_ids >= 0) & (local_ids < per_rank)).nonzero().flatten()
    experts_A, order = torch.sort(local_ids[slots], stable=True)
    slots_A = slots[order]
    return DispatchPlan(
        num_tokens=num_tokens,
        sent_to_token_S=sent_to_token_S,
        send_P=send_P,
        receive_P=receive_P,
        assignment_to_row_A=slots_A // top_k,
        assignment_to_slot_A=slots_A,
        rows_E=tuple(torch.bincount(experts_A, minlength=per_rank).tolist()),
    )
