"""The plan of a rank that holds all experts: nothing travels. Legend: see ``plan``; N tokens."""

import torch

from deepseek_train.parallel.expert.announce import Told, check_headers
from deepseek_train.parallel.expert.group import ExpertGroup
from deepseek_train.parallel.expert.journey import WireFormats
from deepseek_train.parallel.expert.plan import DispatchPlan, assign, count_local, on_host
from deepseek_train.phases.parcel import Stay


def plan_alone(
    told: Told, num_tokens: int, num_experts: int, group: ExpertGroup, formats: WireFormats
) -> DispatchPlan:
    """Tokens are served where they are, in any format. Raises RoutingFault."""
    header, rows_E = on_host(told.header_P2, count_local(told.ids_PCK, 0, num_experts))
    check_headers(header, num_experts)
    ids_NK = told.ids_PCK[0, :num_tokens]
    rows_N = torch.arange(num_tokens, device=ids_NK.device)
    return DispatchPlan(num_tokens, assign(ids_NK, rows_N, 0, rows_E), Stay(), Stay())
