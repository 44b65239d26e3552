"""The vocabulary of pipeline schedules: a schedule is a value, for each rank an ordered list of actions.

Stages are numbered along the model (0 holds the embedding, the last one the head), micro-batches over the
whole step. In bidirectional schedules each direction has its own micro-batches: the first half flows along
ranks 0 -> P-1, the second half P-1 -> 0. Which rank runs (stage, micro-batch) is ``Placement.rank_of``. No
torch here: the executor, the simulator and the renderer all interpret these same values.
"""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What is done to one micro-batch in one stage. The value is its letter in the text form."""

    FORWARD = "F"
    BACKWARD = "B"  # input gradients and weight gradients
    BACKWARD_INPUT = "I"  # input gradients only; weight gradients are queued
    BACKWARD_WEIGHT = "W"  # the oldest queued weight gradients of this rank


@dataclass(frozen=True)
class Action:
    """One chunk of work: ``kind`` on ``microbatch`` in ``stage``. Text form ``2F0``: stage 2, forward,
    micro-batch 0.
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"


@dataclass(frozen=True)
class Pair:
    """A forward and a full backward chunk run as one, their phases interleaved (V3 report figure 4).
    Text form ``2F3&5B1``."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


Step = Action | Pair


@dataclass(frozen=True)
class Placement:
    """Which rank runs a stage for a micro-batch.

    ``ranks_SX[s][d]`` is the rank that runs stage s for direction d; a one-directional schedule has one
    direction. Micro-batches 0 .. M/2-1 belong to direction 0, the rest to direction 1.
    """

    num_ranks: int
    num_microbatches: int
    ranks_SX: tuple[tuple[int, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.ranks_SX)

    @property
    def num_directions(self) -> int:
        return len(self.ranks_SX[0])

    def direction_of(self, microbatch: int) -> int:
        return microbatch * self.num_directions // self.num_microbatches

    def rank_of(self, stage: int, microbatch: int) -> int:
        return self.ranks_SX[stage][self.direction_of(microbatch)]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages whose weights ``rank`` holds, ascending."""
        return tuple(s for s, ranks in enumerate(self.ranks_SX) if rank in ranks)

    def holders_of(self, stage: int) -> tuple[int, ...]:
        """Ranks that hold a copy of ``stage``, ascending: its replicas inside the pipeline group."""
        return tuple(sorted(set(self.ranks_SX[stage])))


@dataclass(frozen=True)
class Schedule:
    """``steps_R[r]``: what rank r does, in order."""

    name: str
    placement: Placement
    steps_R: tuple[tuple[Step, ...], ...]
