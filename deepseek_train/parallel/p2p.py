"""Point-to-point links of a pipeline: for each pair of ranks and each kind of message one first-in-first-out channel.

Activations and gradients have channels of their own: in an overlapped pair either may be ready first. There are four
process groups, for each kind one for messages to higher ranks and one for messages to lower ranks, so that on NCCL the
two directions between a pair of neighbours never wait for each other in one stream.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.schedule.dataflow import MessageKind


@dataclass(frozen=True)
class Arriving:
    """A posted receive."""

    buffer: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The tensor, once it is here."""
        self.work.wait()
        return self.buffer


@dataclass(frozen=True)
class Channel:
    """The groups of one kind of message."""

    down: dist.ProcessGroup  # to higher pipeline ranks
    up: dist.ProcessGroup


class Links:
    """This rank's links. ``ranks`` are the pipeline's global ranks, ``me`` its own index among them."""

    def __init__(self, channels: dict[MessageKind, Channel], ranks: tuple[int, ...], me: int) -> None:
        self._channels, self._ranks, self.me = channels, ranks, me
        self._sending: dict[tuple[int, MessageKind], deque[tuple[dist.Work, Tensor]]] = {}

    def send(self, tensor: Tensor, target: int, kind: MessageKind, window: int) -> None:
        """Starts sending to pipeline rank ``target`` and keeps ``tensor`` alive until it has left. With ``window``
        sends already under way on the channel, waits for the oldest first (``schedule.lower.send_windows``)."""
        queue = self._sending.setdefault((target, kind), deque())
        while queue and len(queue) >= window:  # a window of 0: the receive is sure to have been posted
            queue.popleft()[0].wait()
        channel = self._channels[kind]
        tensor = tensor.contiguous()
        group = channel.down if target > self.me else channel.up
        work = dist.isend(tensor, self._ranks[target], group=group)
        assert work is not None
        queue.append((work, tensor))

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int, kind: MessageKind
    ) -> Arriving:
        """Posts the receive of the next tensor on the channel from pipeline rank ``source``."""
        channel = self._channels[kind]
        buffer = torch.empty(shape, dtype=dtype, device=device)
        group = channel.down if source < self.me else channel.up
        work = dist.irecv(buffer, self._ranks[source], group=group)
        assert work is not None
        return Arriving(buffer, work)

    def drain(self) -> None:
        """Waits until everything sent has left."""
        for queue in self._sending.values():
            while queue:
                queue.popleft()[0].wait()
