"""Which expert-sorted row is whose, worked out on the device from what the host knows already: it never waits.

Legend: see ``moe``.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from deepseek_kernels.formats import Groups
from deepseek_kernels.shapes import check_dtype, check_shape


@dataclass(frozen=True)
class Order:
    """Received rows and expert-sorted, padded rows, each seen from the other. -1: none."""

    padded_to_row_P: Tensor  # int32
    row_to_padded_RK: Tensor  # int32
    assignment_to_padded_A: Tensor  # int64: where values that lie one per assignment go


def order(assignment_to_slot_A: Tensor, num_rows: int, top_k: int, groups: Groups) -> Order:
    """``assignment_to_slot``: int64, for each assignment, by expert, its place in [R, K] flattened; ``groups`` on the
    same device. Plain torch on every backend."""
    device, count = assignment_to_slot_A.device, len(assignment_to_slot_A)
    rows_E = groups.rows_E
    check_dtype("order", "assignment_to_slot", assignment_to_slot_A.dtype, torch.int64)
    check_shape("order", "assignment_to_slot", assignment_to_slot_A, (sum(rows_E),), "groups of", rows_E)
    ends = torch.tensor([*accumulate(rows_E)], dtype=torch.int64).to(device, non_blocking=True)
    sorted_A = torch.arange(count, device=device)
    expert_A = torch.searchsorted(ends, sorted_A, right=True)
    # Of all padding, what lies before an assignment is that of the experts before its own.
    gap_E = groups.starts[1:] - ends
    gap_E = torch.cat([gap_E.new_zeros(1), gap_E])
    padded_A = sorted_A + gap_E[expert_A]
    padded_to_row_P = torch.full((groups.padded,), -1, dtype=torch.int32, device=device)
    row_to_padded = torch.full((num_rows * top_k,), -1, dtype=torch.int32, device=device)
    padded_to_row_P.scatter_(0, padded_A, (assignment_to_slot_A // top_k).int())
    row_to_padded.scatter_(0, assignment_to_slot_A, padded_A.int())
    return Order(padded_to_row_P, row_to_padded.view(num_rows, top_k), padded_A)
