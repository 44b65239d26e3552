"""Rows sorted by expert, each expert's share padded to a multiple of 128: where each received row goes, and back.

Legend: R received rows, K experts per token, A assignments by expert, P padded rows by expert, E experts, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.formats import Groups, Rows


@dataclass(frozen=True)
class Order:
    """Received rows and sorted, padded rows, each seen from the other. -1: none."""

    groups: Groups
    padded_to_row_P: Tensor
    row_to_padded_RK: Tensor

    @staticmethod
    def of(assignment_to_slot_A: Tensor, rows_E: tuple[int, ...], num_rows: int, top_k: int) -> "Order":
        """``assignment_to_slot``: for each assignment, by expert, its place in [R, K], flat. The device is not
        waited for."""
        device = assignment_to_slot_A.device
        groups = Groups.of(rows_E, device)
        counts_E = torch.tensor(rows_E, dtype=torch.int64).to(device, non_blocking=True)
        padding_E = groups.starts[:-1] - (counts_E.cumsum(0) - counts_E)  # before an expert's first row
        count = len(assignment_to_slot_A)
        padded_A = torch.arange(count, device=device) + padding_E.repeat_interleave(
            counts_E, output_size=count
        )
        padded_to_row_P = torch.full((groups.padded,), -1, dtype=torch.int64, device=device)
        row_to_padded = torch.full((num_rows * top_k,), -1, dtype=torch.int64, device=device)
        padded_to_row_P[padded_A] = assignment_to_slot_A // top_k
        row_to_padded[assignment_to_slot_A] = padded_A
        return Order(groups, padded_to_row_P, row_to_padded.view(num_rows, top_k))

    def expand(self, rows: Rows) -> Rows:
        """A copy for each assignment; zeros between."""
        values = _picked(rows.values.view(torch.uint8), self.padded_to_row_P, 0).view(rows.values.dtype)
        return Rows(values, _picked(rows.scales.t(), self.padded_to_row_P, 1.0).t().contiguous(), rows.width)

    def reduce(self, y_PD: Tensor) -> Tensor:
        """Of each received row the sum over its assignments, in FP32, in the order of k, rounded once: [R, D]."""
        total_RD = y_PD.new_zeros(len(self.row_to_padded_RK), y_PD.shape[1], dtype=torch.float32)
        for padded_R in self.row_to_padded_RK.unbind(1):
            total_RD += _picked(y_PD, padded_R, 0.0)
        return total_RD.to(y_PD.dtype)

    def to_padded(self, weights_RK: Tensor) -> Tensor:
        """Numbers of assignments as numbers of padded rows: [P]; zeros between."""
        flat = weights_RK.new_zeros(len(self.padded_to_row_P) + 1)
        return flat.index_copy_(0, self._slots(), weights_RK.flatten())[:-1]

    def from_padded(self, weights_P: Tensor) -> Tensor:
        """The reverse: [R, K]; zeros where this rank has no such expert."""
        return _picked(weights_P.unsqueeze(1), self.row_to_padded_RK.flatten(), 0.0).view(
            self.row_to_padded_RK.shape
        )

    def _slots(self) -> Tensor:
        """The padded row of each slot of [R, K]; the one behind the last for none."""
        at = self.row_to_padded_RK.flatten()
        return torch.where(at >= 0, at, len(self.padded_to_row_P))


def _picked(x: Tensor, index: Tensor, otherwise: float) -> Tensor:
    """Rows of ``x``; ``otherwise`` where the index is -1. Nothing may be picked from no rows, then there is none."""
    if len(x) == 0:
        return x.new_full((len(index), *x.shape[1:]), otherwise)
    picked = x.index_select(0, index.clamp(min=0))
    return picked.masked_fill_((index < 0).unsqueeze(1), otherwise)
