"""All-to-all of rows and all-gather of messages among some ranks, as legs of a transfer (``carry``)."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.parallel.traffic import Traffic
from deepseek_train.spec.links import LinkClass, Purpose, link_bytes


class SplitMismatch(ValueError):
    """Two ranks disagree about how many rows pass between them."""


@dataclass(frozen=True)
class Peers:
    """Ranks that exchange rows: their process group, this rank's place in it, what links lead to each of them."""

    group: dist.ProcessGroup
    rank: int
    links: tuple[LinkClass, ...]
    traffic: Traffic
    check_splits: bool = False

    @property
    def size(self) -> int:
        return len(self.links)


Leg = Generator[dist.Work, None, Tensor]


def exchange(rows: Tensor, send: list[int], receive: list[int], peers: Peers, purpose: Purpose) -> Leg:
    """Of ``rows`` the next ``send[j]`` go to peer j; returns ``receive[i]`` from each peer i, by peer."""
    if peers.check_splits:
        yield from _check(send, receive, rows.device, peers)
    row_bytes = rows[:1].nbytes if len(rows) else rows.new_empty(1, *rows.shape[1:]).nbytes
    peers.traffic.add(purpose, link_bytes(peers.links, [n * row_bytes for n in send]))
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    yield _started(dist.all_to_all_single(received, rows, receive, send, group=peers.group, async_op=True))
    return received


def gather(message: Tensor, peers: Peers, purpose: Purpose) -> Leg:
    """Every peer's ``message``, stacked by peer. Counts what each is told, whatever way the network takes."""
    told = message.new_empty(peers.size, *message.shape)
    peers.traffic.add(purpose, link_bytes(peers.links, [message.nbytes] * peers.size))
    yield _started(dist.all_gather(list(told.unbind()), message, group=peers.group, async_op=True))
    return told


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work


def _check(
    send: list[int], receive: list[int], device: torch.device, peers: Peers
) -> Generator[dist.Work, None, None]:
    """gloo fills the difference with garbage and NCCL hangs when split sizes disagree: compare them first."""
    announced = torch.empty(peers.size, dtype=torch.int64, device=device)
    said = torch.tensor(send, device=device)
    yield _started(dist.all_to_all_single(announced, said, group=peers.group, async_op=True))
    for peer, (given, expected) in enumerate(zip(announced.tolist(), receive, strict=True)):
        if given != expected:
            raise SplitMismatch(
                f"all-to-all: peer {peers.rank} expects {expected} rows from peer {peer}, which sends {given}. The "
                f"dispatch plans of the two ranks differ: they run different micro-batches or layers."
            )
