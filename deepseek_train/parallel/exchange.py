"""All-to-all of rows as a route: what rank i sends to rank j comes back on the way backward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.phases.parcel import Tensors


class SplitMismatch(RuntimeError):
    """Two ranks disagree about how many rows pass between them."""


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that together hold all experts of a layer. ``group`` is None where one rank holds them all."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    check_splits: bool = False
    plans: dist.ProcessGroup | None = (
        None  # the same ranks: row counts must not queue behind rows; None: ``group``
    )


ALONE = ExpertGroup(group=None, rank=0, size=1)


@dataclass(frozen=True)
class Exchanging:
    """An all-to-all under way. On CUDA it runs in the group's own stream, and ``wait`` holds back the current stream
    only, not the host."""

    works: tuple[dist.Work, ...]
    received: Tensors
    sent: Tensors  # kept until the network is done with them

    def wait(self) -> Tensors:
        for work in self.works:
            work.wait()
        return self.received

    def ready(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def when_done(self, note: Callable[[], None]) -> None:
        self.works[-1].get_future().add_done_callback(lambda _: note())


@dataclass(frozen=True)
class Exchange:
    """Rows of each tensor, split by rank: ``send_P[j]`` consecutive ones go to rank j, ``receive_P[i]`` come from rank
    i and are laid down by source rank."""

    send_P: list[int]
    receive_P: list[int]
    group: ExpertGroup

    def start(self, tensors: Tensors) -> Exchanging:
        if self.group.check_splits:
            _check(self.send_P, self.receive_P, tensors[0].device, self.group)
        sent = tuple(t.contiguous() for t in tensors)
        received = tuple(t.new_empty(sum(self.receive_P), *t.shape[1:]) for t in tensors)
        works = []
        for there, here in zip(sent, received, strict=True):
            work = dist.all_to_all_single(
                here, there, self.receive_P, self.send_P, group=self.group.group, async_op=True
            )
            assert work is not None
            works.append(work)
        return Exchanging(tuple(works), received, sent)

    def back(self) -> "Exchange":
        return Exchange(self.receive_P, self.send_P, self.group)


def exchange_counts(counts_P: Tensor, group: ExpertGroup) -> list[int]:
    """Rows each rank of the group will send here, given the rows sent to each."""
    received_P = torch.empty_like(counts_P)
    dist.all_to_all_single(received_P, counts_P, group=group.plans or group.group)
    return received_P.tolist()


def _check(send_P: list[int], receive_P: list[int], device: torch.device, group: ExpertGroup) -> None:
    """gloo fills the difference with garbage and NCCL hangs when split sizes disagree: compare them first."""
    announced_P = exchange_counts(torch.tensor(send_P, device=device), group)
    for peer, (announced, expected) in enumerate(zip(announced_P, receive_P, strict=True)):
        if announced != expected:
            raise SplitMismatch(
                f"all-to-all: expert rank {group.rank} expects {expected} rows from expert rank {peer}, which sends "
                f"{announced}. The dispatch plans of the two ranks differ: they run different micro-batches or layers."
            )
