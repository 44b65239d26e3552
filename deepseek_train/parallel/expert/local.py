"""What happens to rows on the rank of their experts: one row per assignment before, one sum per received row after.

Legend: R received rows, K experts per token, A assignments (by expert, then source), D hidden.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_train.parallel.expert.journey import Sum, summed
from deepseek_train.parallel.expert.plan import Arrivals


@dataclass(frozen=True)
class Dispatched:
    """Tokens as the ranks of their experts received them."""

    x_RD: Tensor
    weights_RK: Tensor  # routing weights of the received rows, for all K experts of the token
    arrivals: Arrivals


def expand(dispatched: Dispatched) -> tuple[Tensor, Tensor]:
    """One row per assignment, grouped by local expert: x_AD and its routing weights [A]."""
    arrivals = dispatched.arrivals
    x_AD = _Copy.apply(dispatched.x_RD, arrivals.assignment_to_row_A)
    return x_AD, dispatched.weights_RK.flatten().index_select(0, arrivals.assignment_to_slot_A)


def reduce(y_AD: Tensor, arrivals: Arrivals) -> Tensor:
    """Sums the assignments of each received row: y_RD, the reverse of ``expand``."""
    return _Sum.apply(y_AD, arrivals.assignment_to_row_A, arrivals.num_rows)


class _Copy(Function):
    """The transpose of ``_Sum``: gradients of a row's copies are added in FP32, rounded once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies_to_rows: Tensor) -> Tensor:
        ctx.save_for_backward(copies_to_rows)
        ctx.num_rows = len(rows)
        return rows.index_select(0, copies_to_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (copies_to_rows,) = ctx.saved_tensors
        return summed(dy, (Sum(copies_to_rows, ctx.num_rows),)), None


class _Sum(Function):
    """Saves the map alone. (``index_add`` itself would keep its rows, for their shape.)"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rows_to_sums: Tensor, num_sums: int) -> Tensor:
        ctx.save_for_backward(rows_to_sums)
        return summed(rows, (Sum(rows_to_sums, num_sums),))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (rows_to_sums,) = ctx.saved_tensors
        return dy.index_select(0, rows_to_sums), None, None
