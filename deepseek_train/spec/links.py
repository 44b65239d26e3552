"""The classes of links between ranks, and bytes counted by them."""

from dataclasses import dataclass, fields
from enum import Enum


class LinkClass(Enum):
    """What leads from one rank to another."""

    LOCAL = "local"  # to itself: memory
    NODE = "node-local"  # NVLink
    CROSS = "cross-node"  # InfiniBand


class Purpose(Enum):
    """Why rows of a MoE layer travel."""

    PLAN = "plan"  # the routers' decisions
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
class ExpertTraffic:
    """What ranks have sent for their experts. ``least_cross``: what had to cross between nodes in dispatches and
    combines: one row for every (token, other node with an expert of it), there and back."""

    plan: LinkBytes = LinkBytes()
    dispatch: LinkBytes = LinkBytes()
    combine: LinkBytes = LinkBytes()
    least_cross: int = 0

    def over_least(self) -> float | None:
        """Bytes of tokens and results that crossed between nodes over the least possible; None where none had to."""
        crossed = self.dispatch.cross + self.combine.cross
        return crossed / self.least_cross if self.least_cross else None

    def numbers(self) -> list[int]:
        """All counts in a row, for ``of``."""
        kinds = (self.plan, self.dispatch, self.combine)
        return [*(getattr(kind, f.name) for kind in kinds for f in fields(kind)), self.least_cross]

    @staticmethod
    def of(numbers: list[int]) -> "ExpertTraffic":
        plan, dispatch, combine = (LinkBytes(*numbers[i : i + 3]) for i in (0, 3, 6))
        return ExpertTraffic(plan, dispatch, combine, numbers[9])
