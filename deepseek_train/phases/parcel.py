"""Tensors on their way between ranks: what a phase of the communication lane takes and gives.

Such a phase computes nothing. It takes a ``Parcel``, starts moving its tensors, and gives the same parcel with the
tensors that arrived. Its backward moves their gradients back along the reverse route.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

Tensors = tuple[Tensor, ...]


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> Tensors:
        """What arrived; on CPUs once it is here, on CUDA the current stream waits for it. May be called again."""

    def ready(self) -> bool:
        """Whether ``wait`` would return at once."""

    def when_done(self, note: Callable[[], None]) -> None:
        """Calls ``note`` at the moment the transfer ends (CPUs; for traces)."""


class Route(Protocol):
    """Where tensors go, the same way for all of a parcel."""

    def start(self, tensors: Tensors) -> Pending:
        """Starts moving ``tensors`` (collective over the ranks of the route)."""

    def back(self) -> "Route":
        """The way their gradients take."""


@dataclass(frozen=True)
class Parcel:
    """``stays`` waits on this rank for what comes back. The tensors of ``moves`` all take ``route``."""

    stays: Any
    moves: Tensors
    route: Route


@dataclass(frozen=True)
class InTransit:
    """A parcel whose tensors have left. ``carries``: which of them have a gradient to bring back."""

    parcel: Parcel
    pending: Pending
    carries: tuple[bool, ...]

    def arrived(self) -> Parcel:
        moved = self.pending.wait()
        for tensor, carries in zip(moved, self.carries, strict=True):
            tensor.requires_grad_(carries)
        return replace(self.parcel, moves=moved)


@dataclass(frozen=True)
class Here:
    """Nothing to wait for."""

    tensors: Tensors

    def wait(self) -> Tensors:
        return self.tensors

    def ready(self) -> bool:
        return True

    def when_done(self, note: Callable[[], None]) -> None:
        note()


@dataclass(frozen=True)
class Stay:
    """The route of ranks that have all they need."""

    def start(self, tensors: Tensors) -> Here:
        return Here(tensors)

    def back(self) -> "Stay":
        return self


def depart(parcel: Parcel, *, recorded: bool) -> InTransit:
    """Starts the transfer. ``recorded``: gradients will come back for the tensors that require one."""
    carries = tuple(recorded and t.requires_grad for t in parcel.moves)
    return InTransit(parcel, parcel.route.start(tuple(t.detach() for t in parcel.moves)), carries)


def arrived(value: Any) -> Any:
    """``value``, waited for where it is still in transit."""
    return value.arrived() if isinstance(value, InTransit) else value
