"""What happens to rows on the rank of their experts: one row per assignment before, one sum per received row after.

Legend: R received rows, K experts per token, A assignments (by expert, then source), D hidden.
"""

from dataclasses import dataclass
from typing import Any, Protocol

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


class Copies(Protocol):
    """Which row each assignment is a copy of, to go both ways."""

    def copied(self, rows_RD: Tensor) -> Tensor: ...

    def summed(self, copies_AD: Tensor) -> Tensor:
        """The transpose: added in FP32, rounded once."""
        ...


@dataclass(frozen=True)
class ByIndex:
    """As torch has it: on GPUs the order of additions is left to chance."""

    arrivals: Arrivals

    def copied(self, rows_RD: Tensor) -> Tensor:
        return rows_RD.index_select(0, self.arrivals.assignment_to_row_A)

    def summed(self, copies_AD: Tensor) -> Tensor:
        return summed(copies_AD, (Sum(self.arrivals.assignment_to_row_A, self.arrivals.num_rows),))


@dataclass(frozen=True)
class ByKernel:
    """By ``deepseek_kernels.moe``, in the order of the token's experts, without padding between experts."""

    assignment_to_row_A: Tensor  # int32
    row_to_assignment_RK: Tensor  # int32; -1: none
    backend: str

    @staticmethod
    def of(arrivals: Arrivals, top_k: int, backend: str) -> "ByKernel":
        slots_A = arrivals.assignment_to_slot_A
        assignments = slots_A.new_full((arrivals.num_rows, top_k), -1, dtype=torch.int32)
        numbers_A = torch.arange(len(slots_A), dtype=torch.int32, device=slots_A.device)
        assignments.view(-1).scatter_(0, slots_A, numbers_A)
        return ByKernel(arrivals.assignment_to_row_A.int(), assignments, backend)

    def copied(self, rows_RD: Tensor) -> Tensor:
        return moe.expand(rows_RD, self.assignment_to_row_A, backend=self.backend)

    def summed(self, copies_AD: Tensor) -> Tensor:
        return moe.reduce(copies_AD, self.row_to_assignment_RK, backend=self.backend)


def copies_of(dispatched: Dispatched, backend: str) -> Copies:
    """``backend``: of the family ``moe``."""
    arrivals, top_k = dispatched.arrivals, dispatched.weights_RK.shape[1]
    return ByIndex(arrivals) if backend == "torch" else ByKernel.of(arrivals, top_k, backend)


def expand(dispatched: Dispatched, copies: Copies) -> tuple[Tensor, Tensor]:
    """One row per assignment, grouped by local expert: x_AD and its routing weights [A]."""
    x_AD = _Copy.apply(dispatched.x_RD, copies)
    return x_AD, dispatched.weights_RK.flatten().index_select(0, dispatched.arrivals.assignment_to_slot_A)


def reduce(y_AD: Tensor, copies: Copies) -> Tensor:
    """Sums the assignments of each received row: y_RD, the reverse of ``expand``."""
    return _Sum.apply(y_AD, copies)


class _Copy(Function):
    """The transpose of ``_Sum``."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return copies.copied(rows_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.summed(dy_AD), None


class _Sum(Function):
    """Keeps the map alone. (``index_add`` itself would keep its rows, for their shape.)"""

    @staticmethod
    def forward(ctx: Any, copies_AD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return copies.summed(copies_AD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.copied(dy_RD), None
