"""Messages between actions: those of this rank's own stages are laid aside, the others go over the links."""

from torch import Tensor

from deepseek_train.parallel.p2p import Arriving, Links
from deepseek_train.pipeline.values import Boundary
from deepseek_train.schedule.dataflow import Message
from deepseek_train.schedule.lower import Link, link_of


class Mail:
    """One pass's messages. ``windows``: sends that may be under way on each link."""

    def __init__(self, links: Links, boundary: Boundary, windows: dict[Link, int]) -> None:
        self._links, self._boundary, self._windows = links, boundary, windows
        self._waiting: dict[Message, Tensor | Arriving] = {}

    def expect(self, message: Message) -> None:
        """Posts the receive of ``message``."""
        b = self._boundary
        self._waiting[message] = self._links.receive(
            b.shape_BTD, b.dtype, b.device, message.source, message.kind
        )

    def put(self, message: Message, tensor: Tensor) -> None:
        """Lays ``tensor`` aside for this rank, or starts sending it."""
        if message.is_local:
            self._waiting[message] = tensor
        else:
            self._links.send(tensor, message.target, message.kind, self._windows[link_of(message)])

    def take(self, message: Message) -> Tensor:
        """The tensor of ``message``, once it is here."""
        found = self._waiting.pop(message)
        return found.wait() if isinstance(found, Arriving) else found
