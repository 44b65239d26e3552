"""Received rows and the same rows sorted by expert, each expert's share padded to a multiple of 128.

Legend: R received rows, K experts per token, A assignments by expert, P padded rows by expert, E experts, D hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from deepseek_kernels.formats import Groups, Rows
from deepseek_kernels.moe import Order, expand_rows, order, reduce


@dataclass(frozen=True)
class Sorting:
    """The way there and back. Legend of ``order``: ``deepseek_kernels.moe``."""

    groups: Groups
    order: Order
    assignment_to_slot_A: Tensor
    backend: str

    @staticmethod
    def of(
        assignment_to_slot_A: Tensor, rows_E: tuple[int, ...], num_rows: int, top_k: int, backend: str
    ) -> "Sorting":
        """``assignment_to_slot``: of each assignment, by expert, its place in [R, K], flat. The device is not waited
        for."""
        groups = Groups.of(rows_E, assignment_to_slot_A.device)
        return Sorting(
            groups, order(assignment_to_slot_A, num_rows, top_k, groups), assignment_to_slot_A, backend
        )

    def expand(self, rows_RD: Rows, *, pow2: bool) -> Rows:
        """A copy for each assignment, zeros between: [P, D]. ``pow2``: as the rows were quantised."""
        return expand_rows(rows_RD, self.order.padded_to_row_P, pow2=pow2, backend=self.backend)

    def reduce(self, y_PD: Tensor) -> Tensor:
        """Of each received row the sum over its assignments, in FP32, rounded once: [R, D]."""
        return reduce(y_PD, self.order.row_to_padded_RK, backend=self.backend)

    def to_padded(self, weights_RK: Tensor) -> Tensor:
        """Numbers of assignments as numbers of padded rows: [P]; zeros between."""
        weights_A = weights_RK.flatten().index_select(0, self.assignment_to_slot_A)
        padded_P = weights_RK.new_zeros(self.groups.padded)
        return padded_P.index_copy_(0, self.order.assignment_to_padded_A, weights_A)

    def from_padded(self, weights_P: Tensor) -> Tensor:
        """The reverse: [R, K]; zeros where this rank has no such expert."""
        weights_A = weights_P.index_select(0, self.order.assignment_to_padded_A)
        slots = weights_P.new_zeros(self.order.row_to_padded_RK.numel())
        return slots.index_copy_(0, self.assignment_to_slot_A, weights_A).view(
            self.order.row_to_padded_RK.shape
        )
