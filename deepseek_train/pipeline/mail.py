"""Messages between actions: those of this rank's own stages are laid aside, the others go over the links."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deepseek_train.parallel.p2p import Arriving, Links
from deepseek_train.pipeline.values import Boundary
from deepseek_train.schedule.dataflow import Message
from deepseek_train.schedule.lower import Link, link_of
from deepseek_train.watch.whereabouts import Whereabouts


class MessageLost(RuntimeError):
    """A link failed: the peer is gone, or was silent for longer than the group's timeout. Says which message this rank
    was busy with, and with whom; the cause may lie further on, a rank that is gone takes its neighbours along."""


class Mail:
    """One pass's messages. ``windows``: sends that may be under way on each link; ``where``: is told what it waits
    for."""

    def __init__(
        self, links: Links, boundary: Boundary, windows: dict[Link, int], where: Whereabouts
    ) -> None:
        self._links, self._boundary, self._windows, self._where = links, boundary, windows, where
        self._waiting: dict[Message, Tensor | Arriving] = {}

    def expect(self, message: Message) -> None:
        """Posts the receive of ``message``."""
        b = self._boundary
        with self._busy(f"getting ready for the {message}"):
            self._waiting[message] = self._links.receive(
                b.shape_BTD, b.dtype, b.device, message.source, message.kind
            )

    def put(self, message: Message, tensor: Tensor) -> None:
        """Lays ``tensor`` aside for this rank, or starts sending it."""
        if message.is_local:
            self._waiting[message] = tensor
        else:
            what = f"{message.kind.value} of micro-batch {message.microbatch} for stage {message.stage}"
            with self._busy(f"sending the {what} to rank {message.target}"):
                self._links.send(tensor, message.target, message.kind, self._windows[link_of(message)])

    def take(self, message: Message) -> Tensor:
        """The tensor of ``message``, once it is here."""
        found = self._waiting.pop(message)
        if isinstance(found, Tensor):
            return found
        with self._busy(f"waiting for the {message}"):
            return found.wait()

    def drain(self) -> None:
        """Waits until everything sent has left."""
        with self._busy("waiting until all it sent has left"):
            self._links.drain()

    @contextmanager
    def _busy(self, doing: str) -> Iterator[None]:
        self._where.waits(doing)
        try:
            yield
        except torch.OutOfMemoryError:  # a RuntimeError too, but no fault of the link
            raise
        except RuntimeError as error:  # gloo's or NCCL's own words
            raise MessageLost(f"{doing}: {error}") from error
        self._where.goes_on()
