"""All-to-all of rows with a gradient: what rank i sends to rank j comes back on the way backward."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class SplitMismatch(RuntimeError):
    """Two ranks disagree about how many rows pass between them."""


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that together hold all experts of a layer. ``group`` is None where one rank holds them all."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    check_splits: bool = False


ALONE = ExpertGroup(group=None, rank=0, size=1)


def exchange_counts(counts_P: Tensor, group: ExpertGroup) -> list[int]:
    """Rows each rank of the group will send here, given the rows sent to each."""
    received_P = torch.empty_like(counts_P)
    dist.all_to_all_single(received_P, counts_P, group=group.group)
    return received_P.tolist()


def exchange_rows(x: Tensor, send_P: list[int], receive_P: list[int], group: ExpertGroup) -> Tensor:
    """Sends ``send_P[j]`` consecutive rows of ``x`` to rank j; the rows received, by source rank. No gradient."""
    if group.check_splits:
        _check(send_P, receive_P, x.device, group)
    received = x.new_empty(sum(receive_P), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receive_P, send_P, group=group.group)
    return received


def exchange(x: Tensor, send_P: list[int], receive_P: list[int], group: ExpertGroup) -> Tensor:
    """``exchange_rows`` with its gradient (the reverse exchange)."""
    return _Exchange.apply(x, send_P, receive_P, group)


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send_P: list[int], receive_P: list[int], group: ExpertGroup) -> Tensor:
        ctx.sizes, ctx.group = (send_P, receive_P), group
        return exchange_rows(x, send_P, receive_P, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        send_P, receive_P = ctx.sizes
        return exchange_rows(dy, receive_P, send_P, ctx.group), None, None, None


def _check(send_P: list[int], receive_P: list[int], device: torch.device, group: ExpertGroup) -> None:
    """gloo fills the difference with garbage and NCCL hangs when split sizes disagree: compare them first."""
    announced_P = exchange_counts(torch.tensor(send_P, device=device), group)
    for peer, (announced, expected) in enumerate(zip(announced_P, receive_P, strict=True)):
        if announced != expected:
            raise SplitMismatch(
                f"all-to-all: expert rank {group.rank} expects {expected} rows from expert rank {peer}, which sends "
                f"{announced}. The dispatch plans of the two ranks differ: they run different micro-batches or layers."
            )
