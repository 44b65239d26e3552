"""What happens to rows on the rank of their experts: one row per assignment before, one sum per received row after.

Legend: R received rows, K experts per token, A assignments (by expert, then source), D hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels import moe
from deepseek_train.parallel.expert.journey import Sum, summed
from deepseek_train.parallel.expert.plan import Arrivals


@dataclass(frozen=True)
class Dispatched:
    """Tokens as the ranks of their experts received them."""

    x_RD: Tensor
    weights_RK: Tensor  # routing weights of the received rows, for all K experts of the token
    arrivals: Arrivals


def expand(dispatched: Dispatched, backend: str = "reference") -> tuple[Tensor, Tensor]:
    """One row per assignment, grouped by local expert: x_AD and its routing weights [A]. ``backend``: of
    ``deepseek_kernels.moe``; all but Triton's are index operations of torch here, which know FP64."""
    arrivals = dispatched.arrivals
    x_AD = _Copy.apply(dispatched.x_RD, arrivals, backend)
    return x_AD, dispatched.weights_RK.flatten().index_select(0, arrivals.assignment_to_slot_A)


def reduce(y_AD: Tensor, arrivals: Arrivals, backend: str = "reference") -> Tensor:
    """Sums the assignments of each received row: y_RD, the reverse of ``expand``."""
    return _Sum.apply(y_AD, arrivals, backend)


class _Copy(Function):
    """The transpose of ``_Sum``: gradients of a row's copies are added in FP32, rounded once."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, arrivals: Arrivals, backend: str) -> Tensor:
        ctx.arrivals, ctx.backend = arrivals, backend
        return _copies(x_RD, arrivals, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None, None]:
        return _sums(dy_AD, ctx.arrivals, ctx.backend), None, None


class _Sum(Function):
    """Keeps the maps alone. (``index_add`` itself would keep its rows, for their shape.)"""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, arrivals: Arrivals, backend: str) -> Tensor:
        ctx.arrivals, ctx.backend = arrivals, backend
        return _sums(y_AD, arrivals, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None]:
        return _copies(dy_RD, ctx.arrivals, ctx.backend), None, None


def _copies(x_RD: Tensor, arrivals: Arrivals, backend: str) -> Tensor:
    rows_A = arrivals.assignment_to_row_A
    if backend == "triton":
        return moe.expand(x_RD.contiguous(), rows_A.int(), backend=backend)
    return x_RD.index_select(0, rows_A)


def _sums(y_AD: Tensor, arrivals: Arrivals, backend: str) -> Tensor:
    rows_A, slots_A = arrivals.assignment_to_row_A, arrivals.assignment_to_slot_A
    if backend != "triton":
        return summed(y_AD, (Sum(rows_A, arrivals.num_rows),))
    none = torch.full((arrivals.num_rows * arrivals.top_k,), -1, dtype=torch.int32, device=rows_A.device)
    assignment_RK = none.scatter_(
        0, slots_A, torch.arange(len(slots_A), dtype=torch.int32, device=none.device)
    )
    return moe.reduce(y_AD.contiguous(), assignment_RK.view(-1, arrivals.top_k), backend=backend)
