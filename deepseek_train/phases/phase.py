"""A block *is* its phases: functions from one dataclass to the next, each of one lane.

``forward`` of a block is the fold of its phases; overlapping a forward chunk with a backward chunk calls the same
phases in another order (DESIGN idea 3).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, assert_never

from deepseek_train.schedule.overlap import Part, Role


@dataclass(frozen=True)
class Phase:
    """A computation: ``run`` maps the previous phase's value to the next one's, both (trees of) frozen dataclasses of
    tensors. With ``recompute`` its activations are not kept: the backward pass runs it once more."""

    name: str
    role: Role
    run: Callable[[Any], Any]
    recompute: bool = False

    @property
    def part(self) -> Part:
        return Part(self.role)


@dataclass(frozen=True)
class Move:
    """A communication: a ``Parcel`` in, the same parcel with what arrived out."""

    name: str
    role: Role

    @property
    def part(self) -> Part:
        return Part(self.role, moves=True)


Row = tuple[Phase | Move, ...]


def fold(row: Row, value: Any) -> Any:
    """Runs all phases in order, each communication to its end. Autograd sees through it where all routes ``Stay``."""
    for phase in row:
        match phase:
            case Phase():
                value = phase.run(value)
            case Move():
                value = replace(value, moves=value.route.start(value.moves).wait())
            case _:
                assert_never(phase)
    return value
