"""Flat dispatch: one all-to-all over the expert-parallel group, each token sent once to every rank that needs it.

The same rows travel back in combine, already summed over the experts of a rank. Legend: see ``plan``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_train.parallel.exchange import ExpertGroup, exchange
from deepseek_train.parallel.expert.plan import DispatchPlan


@dataclass(frozen=True)
class Dispatched:
    """Tokens as the ranks of their experts received them."""

    x_RD: Tensor
    weights_RK: Tensor  # routing weights of the received rows, for all K experts of the token
    plan: DispatchPlan


def dispatch(x_ND: Tensor, weights_NK: Tensor, plan: DispatchPlan, group: ExpertGroup) -> Dispatched:
    """Sends every token to the ranks of its experts. Differentiable."""
    if group.size == 1:
        return Dispatched(x_ND, weights_NK, plan)
    rows = plan.sent_to_token_S
    x_RD = exchange(x_ND.index_select(0, rows), plan.send_P, plan.receive_P, group)
    weights_RK = exchange(weights_NK.index_select(0, rows), plan.send_P, plan.receive_P, group)
    return Dispatched(x_RD, weights_RK, plan)


def expand(dispatched: Dispatched) -> tuple[Tensor, Tensor]:
    """One row per assignment, grouped by local expert: x_AD and its routing weights [A]."""
    plan = dispatched.plan
    x_AD = dispatched.x_RD.index_select(0, plan.assignment_to_row_A)
    return x_AD, dispatched.weights_RK.flatten().index_select(0, plan.assignment_to_slot_A)


def reduce(y_AD: Tensor, plan: DispatchPlan) -> Tensor:
    """Sums the assignments of each received row: y_RD, the reverse of ``expand``."""
    return _summed(y_AD, plan.assignment_to_row_A, plan.num_received)


def combine(y_RD: Tensor, plan: DispatchPlan, group: ExpertGroup) -> Tensor:
    """Brings rows back to the ranks of their tokens and sums them: y_ND. Differentiable."""
    if group.size == 1:
        return y_RD
    y_SD = exchange(y_RD, plan.receive_P, plan.send_P, group)
    return _summed(y_SD, plan.sent_to_token_S, plan.num_tokens)


def _summed(rows: Tensor, rows_to_sums: Tensor, num_sums: int) -> Tensor:
    """Sums of rows, accumulated in FP32 (FP64 for FP64 rows), rounded once."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    sums = rows.new_zeros(num_sums, rows.shape[-1], dtype=wide)
    return sums.index_add(0, rows_to_sums, rows.to(wide)).to(rows.dtype)
