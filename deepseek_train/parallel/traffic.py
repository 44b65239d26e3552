"""Bytes that really left a rank for its experts, by the class of link they took."""

from dataclasses import dataclass, field, replace
from enum import Enum
from threading import Lock


class LinkClass(Enum):
    """What leads from one rank to another."""

    LOCAL = "local"  # to itself: memory
    NODE = "node-local"  # NVLink
    CROSS = "cross-node"  # InfiniBand


class Purpose(Enum):
    """Why rows of an MoE layer travel."""

    PLAN = "plan"  # the router's decisions
    DISPATCH = "dispatch"  # tokens to experts, and the gradients of their results
    COMBINE = "combine"  # results to tokens, and the gradients of what the experts were given


@dataclass(frozen=True)
class LinkBytes:
    """Bytes by class of link."""

    local: int = 0
    node: int = 0
    cross: int = 0

    def __add__(self, other: "LinkBytes") -> "LinkBytes":
        return LinkBytes(self.local + other.local, self.node + other.node, self.cross + other.cross)


def link_bytes(links: tuple[LinkClass, ...], bytes_P: list[int]) -> LinkBytes:
    """What ``bytes_P[j]`` over ``links[j]`` come to."""
    totals = {link: sum(b for b, of in zip(bytes_P, links, strict=True) if of is link) for link in LinkClass}
    return LinkBytes(totals[LinkClass.LOCAL], totals[LinkClass.NODE], totals[LinkClass.CROSS])


@dataclass(frozen=True)
class Sent:
    """What one rank has sent. ``least_cross``: what had to cross between nodes in dispatch and combine: one row for
    every (token of this rank, other node with an expert of it), there and back."""

    plan: LinkBytes = LinkBytes()
    dispatch: LinkBytes = LinkBytes()
    combine: LinkBytes = LinkBytes()
    least_cross: int = 0


@dataclass
class Traffic:
    """Counts where rows leave. Hops that follow others are started by the network's threads, hence the lock."""

    _sent: Sent = Sent()
    _lock: Lock = field(default_factory=Lock)

    def add(self, purpose: Purpose, sent: LinkBytes) -> None:
        with self._lock:
            before = self._sent
            self._sent = replace(before, **{purpose.value: getattr(before, purpose.value) + sent})

    def add_least_cross(self, num_bytes: int) -> None:
        with self._lock:
            self._sent = replace(self._sent, least_cross=self._sent.least_cross + num_bytes)

    def take(self) -> Sent:
        """What has been sent since it was last taken. Nothing is under way."""
        with self._lock:
            sent, self._sent = self._sent, Sent()
        return sent
