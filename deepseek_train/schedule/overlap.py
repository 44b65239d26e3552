"""In which order the phases of an overlapped forward-backward pair are issued (V3 report figure 4, V3_SPEC B.1).

A chunk is a row of phases, each with a role: ``attend -> dispatch -> experts -> combine`` once per layer. The backward
chunk runs the same row from its end, and splits the compute phases into input gradients (I) and weight gradients (W).
An order is one repeating unit of (role, half of the pair): data that ``interleave`` spreads over two real chunks.
"""

from dataclasses import dataclass
from enum import Enum

from deepseek_train.schedule.action import Kind


class Lane(Enum):
    """Where a phase runs: the rank's arithmetic, or the network beside it."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"


class Role(Enum):
    """What a phase is to the order of a pair. Everything computed between a combine and the next dispatch (embedding,
    norms, router, head, losses) attends; everything between a dispatch and its combine, or in a dense layer's
    feed-forward network, is the experts' part."""

    ATTEND = "attend"
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    COMBINE = "combine"

    @property
    def lane(self) -> Lane:
        communicates = self in (Role.DISPATCH, Role.COMBINE)
        return Lane.COMMUNICATION if communicates else Lane.COMPUTE


F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


@dataclass(frozen=True)
class Issue:
    """One entry of an order: a communication is started, a computation is run."""

    role: Role
    kind: Kind  # F, or of the backward half I or W


Order = tuple[Issue, ...]
