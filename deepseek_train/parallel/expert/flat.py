"""Flat dispatch: one all-to-all over the expert-parallel group, each token sent once to every rank that needs it.

The same rows travel back in combine, already summed over the experts of a rank. The exchange itself is a route; what
stands here is local and differentiable. Legend: see ``plan``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_train.parallel.exchange import Exchange, ExpertGroup
from deepseek_train.parallel.expert.plan import DispatchPlan
from deepseek_train.phases.parcel import Route, Stay, Tensors


@dataclass(frozen=True)
class Dispatched:
    """Tokens as the ranks of their experts received them."""

    x_RD: Tensor
    weights_RK: Tensor  # routing weights of the received rows, for all K experts of the token
    plan: DispatchPlan


def route(plan: DispatchPlan, group: ExpertGroup) -> Route:
    """The way from tokens to experts; combine takes ``back()``."""
    return Stay() if group.size == 1 else Exchange(plan.send_P, plan.receive_P, group)


def pack(x_ND: Tensor, weights_NK: Tensor, plan: DispatchPlan, group: ExpertGroup) -> Tensors:
    """The rows of tokens and of routing weights to send: x_SD, weights_SK."""
    if group.size == 1:
        return x_ND, weights_NK
    rows = plan.sent_to_token_S
    return x_ND.index_select(0, rows), weights_NK.index_select(0, rows)


def expand(dispatched: Dispatched) -> tuple[Tensor, Tensor]:
    """One row per assignment, grouped by local expert: x_AD and its routing weights [A]."""
    plan = dispatched.plan
    x_AD = dispatched.x_RD.index_select(0, plan.assignment_to_row_A)
    return x_AD, dispatched.weights_RK.flatten().index_select(0, plan.assignment_to_slot_A)


def reduce(y_AD: Tensor, plan: DispatchPlan) -> Tensor:
    """Sums the assignments of each received row: y_RD, the reverse of ``expand``."""
    return _summed(y_AD, plan.assignment_to_row_A, plan.num_received)


def unpack(y_SD: Tensor, plan: DispatchPlan, group: ExpertGroup) -> Tensor:
    """Sums the rows that came back for each token: y_ND, the reverse of ``pack``."""
    return y_SD if group.size == 1 else _summed(y_SD, plan.sent_to_token_S, plan.num_tokens)


class _Sum(Function):
    """Saves the map alone. (``index_add`` itself would keep its rows, for their shape.)"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rows_to_sums: Tensor, num_sums: int) -> Tensor:
        ctx.save_for_backward(rows_to_sums)
        wide = torch.promote_types(rows.dtype, torch.float32)
        sums = rows.new_zeros(num_sums, rows.shape[-1], dtype=wide)
        return sums.index_add_(0, rows_to_sums, rows.to(wide)).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (rows_to_sums,) = ctx.saved_tensors
        return dy.index_select(0, rows_to_sums), None, None


def _summed(rows: Tensor, rows_to_sums: Tensor, num_sums: int) -> Tensor:
    """Sums of rows, accumulated in FP32 (FP64 for FP64 rows), rounded once."""
    return _Sum.apply(rows, rows_to_sums, num_sums)
