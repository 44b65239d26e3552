"""A block *is* its phases: functions from one dataclass to the next, each of one lane.

``forward`` of a block is the fold of its phases; overlapping a forward chunk with a backward chunk calls the same
phases in another order (DESIGN idea 3).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, assert_never

from deepseek_train.phases.moved import moved
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
    """A communication: a ``Parcel`` in, the same parcel with what arrived out. ``beside`` is a computation on what
    stays, from ``Parcel.stays`` to another value of it: it runs while the rest travels, forward and backward."""

    name: str
    role: Role
    beside: Phase | None = None

    @property
    def part(self) -> Part:
        return Part(self.role, moves=True, weights=self.beside.role if self.beside else None)


Row = tuple[Phase | Move, ...]


def under(name: str, row: Row) -> Row:
    """The phases, named as those of ``name``."""
    return tuple(_under(name, phase) for phase in row)


def _under(name: str, phase: Phase | Move) -> Phase | Move:
    named = replace(phase, name=f"{name}.{phase.name}")
    if isinstance(named, Move) and named.beside:
        return replace(named, beside=replace(named.beside, name=f"{name}.{named.beside.name}"))
    return named


def fold(row: Row, value: Any) -> Any:
    """Runs all phases in order, each communication to its end; autograd sees through it."""
    for phase in row:
        match phase:
            case Phase():
                value = phase.run(value)
            case Move():
                arrived = moved(value.route, value.moves)
                stays = phase.beside.run(value.stays) if phase.beside else value.stays
                value = replace(value, stays=stays, moves=arrived)
            case _:
                assert_never(phase)
    return value
