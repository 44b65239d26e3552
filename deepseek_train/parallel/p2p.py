"""Point-to-point links of a pipeline: each directed link between two ranks is one first-in-first-out channel.

Two process groups, one for messages to higher ranks and one for messages to lower ranks, so that on NCCL the two
directions between a pair of neighbours never wait for each other in one stream.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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

    def __init__(
        self, down: dist.ProcessGroup, up: dist.ProcessGroup, ranks: tuple[int, ...], me: int
    ) -> None:
        self._down, self._up, self._ranks, self.me = down, up, ranks, me
        self._sending: dict[int, deque[tuple[dist.Work, Tensor]]] = {}

    def send(self, tensor: Tensor, target: int, window: int) -> None:
        """Starts sending to pipeline rank ``target`` and keeps ``tensor`` alive until it has left. With ``window``
        sends already under way on the link, waits for the oldest first (``schedule.lower.sends_in_flight``)."""
        queue = self._sending.setdefault(target, deque())
        while queue and len(queue) >= window:  # a window of 0: the receive is sure to have been posted
            queue.popleft()[0].wait()
        group = self._down if target > self.me else self._up
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._ranks[target], group=group)
        assert work is not None
        queue.append((work, tensor))

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int
    ) -> Arriving:
        """Posts the receive of the next tensor on the link from pipeline rank ``source``."""
        group = self._down if source < self.me else self._up
        buffer = torch.empty(shape, dtype=dtype, device=device)
        work = dist.irecv(buffer, self._ranks[source], group=group)
        assert work is not None
        return Arriving(buffer, work)

    def drain(self) -> None:
        """Waits until everything sent has left."""
        for queue in self._sending.values():
            while queue:
                queue.popleft()[0].wait()
