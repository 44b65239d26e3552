"""A block *is* its phases: functions from one dataclass to the next, each of one lane.

``forward`` of a block is the fold of its phases; overlapping a forward chunk with a backward chunk calls the same
phases in another order (DESIGN idea 3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Lane(Enum):
    COMPUTE = "compute"
    COMMUNICATION = "communication"


@dataclass(frozen=True)
class Phase:
    """``run`` maps the previous phase's value to the next one's; both are (trees of) frozen dataclasses of tensors."""

    name: str
    lane: Lane
    run: Callable[[Any], Any]


def fold(phases: tuple[Phase, ...], value: Any) -> Any:
    """Runs all phases in order."""
    for phase in phases:
        value = phase.run(value)
    return value
