"""Where each token of a micro-batch goes in one MoE layer: worked out once, on every rank alone, from what all routers
have announced; used by dispatch, combine and both backwards.

Legend: P expert-parallel ranks, C tokens a rank may have at most, K experts per token, R received rows, A assignments
of received rows to local experts, in the order of expert, source rank, source token: the same for every dispatcher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_train.phases.parcel import Route


@dataclass(frozen=True)
class Arrivals:
    """What this rank's experts do with the rows that arrive. ``x_to_y`` reads: for each x, its y."""

    num_rows: int
    assignment_to_row_A: Tensor
    assignment_to_slot_A: Tensor  # flat index into the received [R, K] routing weights
    rows_E: tuple[int, ...]  # assignments of each local expert


@dataclass(frozen=True)
class DispatchPlan:
    """``there``: the route of tokens (hidden vectors and routing weights) to their experts; ``home``: of results."""

    num_tokens: int
    arrivals: Arrivals
    there: Route
    home: Route


def on_host(*tensors: Tensor) -> list[list[int]]:
    """Integers of several tensors as flat lists, with a single wait for the device."""
    numbers = torch.cat([t.flatten() for t in tensors]).tolist()
    lists, at = [], 0
    for tensor in tensors:
        lists.append(numbers[at : at + tensor.numel()])
        at += tensor.numel()
    return lists


def places(mask: Tensor, count: int) -> Tensor:
    """Flat indices of the ``count`` true elements, in order; does not wait for the device."""
    found: Tensor = torch.nonzero_static(mask.flatten(), size=count)
    return found.flatten()


def targets(ids: Tensor, per_target: int, first: int, count: int) -> Tensor:
    """Which of ``count`` targets, from ``first`` on, each row [..., K] of expert ids needs: bool [..., count]."""
    which = ids.div(per_target, rounding_mode="floor") - first
    inside = torch.where((which >= 0) & (which < count) & (ids >= 0), which, count)
    needed = torch.zeros(*ids.shape[:-1], count + 1, dtype=torch.bool, device=ids.device)
    return needed.scatter_(-1, inside, True)[..., :count]


def count_local(ids: Tensor, first: int, count: int) -> Tensor:
    """Assignments to each of ``count`` experts from ``first`` on: [count]. Does not wait for the device
    (``bincount`` would)."""
    local = ids.flatten() - first
    inside = torch.where((local >= 0) & (local < count), local, count)
    return torch.zeros(count + 1, dtype=torch.int64, device=local.device).scatter_add_(
        0, inside, torch.ones_like(inside)
    )[:count]


def assign(ids_RK: Tensor, row_R: Tensor, first: int, rows_E: list[int]) -> Arrivals:
    """``ids_RK``: expert ids of the received tokens by source rank and token; ``row_R``: where each of them lies."""
    top_k = ids_RK.shape[1]
    local = ids_RK.flatten() - first
    slots = places((local >= 0) & (local < len(rows_E)), sum(rows_E))
    order = torch.sort(local[slots], stable=True).indices
    sorted_slots = slots[order]
    rows_A = row_R[sorted_slots // top_k]
    return Arrivals(len(row_R), rows_A, rows_A * top_k + sorted_slots % top_k, tuple(rows_E))
