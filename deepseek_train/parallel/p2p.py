"""Point-to-point links of a pipeline: for each pair of ranks and each kind of message one first-in-first-out channel.

Activations and gradients have channels of their own: in an overlapped pair either may be ready first. The process group
of a message is that of its queue (``schedule.lower.queue_of``), so that on NCCL nothing waits behind what it has
nothing to do with.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.schedule.dataflow import MessageKind
from deepseek_train.schedule.lower import Queue, queue_of


@dataclass(frozen=True)
class Arriving:
    """A posted receive."""

    buffer: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The tensor, once it is here."""
        self.work.wait()
        return self.buffer


class Links:
    """This rank's links. ``ranks`` are the pipeline's global ranks, ``me`` its own index among them."""

    def __init__(self, groups: Mapping[Queue, dist.ProcessGroup], ranks: tuple[int, ...], me: int) -> None:
        self._groups, self._ranks, self.me = groups, ranks, me
        self._sending: dict[tuple[int, MessageKind], deque[tuple[dist.Work, Tensor]]] = {}

    def send(self, tensor: Tensor, target: int, kind: MessageKind, window: int) -> None:
        """Starts sending to pipeline rank ``target`` and keeps ``tensor`` alive until it has left. With ``window``
        sends already under way on the channel, waits for the oldest first (``schedule.windows``)."""
        queue = self._sending.setdefault((target, kind), deque())
        while queue and len(queue) >= window:  # a window of 0: the receive is sure to have been posted
            queue.popleft()[0].wait()
        tensor = tensor.contiguous()
        group = self._groups[queue_of(kind, self.me, target)]
        work = dist.isend(tensor, self._ranks[target], group=group)
        assert work is not None
        queue.append((work, tensor))

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int, kind: MessageKind
    ) -> Arriving:
        """Posts the receive of the next tensor on the channel from pipeline rank ``source``."""
        buffer = torch.empty(shape, dtype=dtype, device=device)
        group = self._groups[queue_of(kind, source, self.me)]
        work = dist.irecv(buffer, self._ranks[source], group=group)
        assert work is not None
        return Arriving(buffer, work)

    def drain(self) -> None:
        """Waits until everything sent has left."""
        for queue in self._sending.values():
            while queue:
                queue.popleft()[0].wait()
