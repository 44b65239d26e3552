"""Who holds up the others, from what the board of a node shows: on paper, so every case can be tested.

Ranks that wait for each other all stop within a step of one another. The cause is whoever died, does not tick, or has
stopped outside a transfer; if nobody here has, it is on another machine, or the ranks disagree about what comes next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from deepseek_train.watch.whereabouts import Sight, State


class Condition(Enum):
    """Of one rank, the first that holds."""

    LEFT = "has ended"
    LOST = "is dead: its process is gone"
    FROZEN = "is frozen: not even its watchdog runs (stopped, starved, or in a call that holds Python's lock)"
    STUCK = "is stuck, in no transfer that it told of"
    WAITING = "waits for others"
    MOVING = "goes on"


# The first of these that some rank is in is the cause.
CAUSES = (Condition.LOST, Condition.FROZEN, Condition.STUCK)


@dataclass(frozen=True)
class Patience:
    """Seconds until silence counts: of a watchdog, and of a rank's main thread."""

    tick: float
    progress: float


@dataclass(frozen=True)
class Judged:
    """A rank and its condition; ``silent``: seconds since its main thread last said something."""

    sight: Sight
    condition: Condition
    silent: float

    def __str__(self) -> str:
        s = self.sight
        return (
            f"rank {s.rank} (pid {s.pid}) {self.condition.value}; silent for {self.silent:.1f} s at {s.place}"
        )


def judged(sight: Sight, alive: bool, now_ns: int, patience: Patience) -> Judged:
    """The condition of a rank that has begun. ``alive``: whether its process is."""
    silent, tickless = (max(0, now_ns - then) / 1e9 for then in (sight.progress_ns, sight.tick_ns))
    if sight.state is State.LEFT:
        condition = Condition.LEFT
    elif not alive:
        condition = Condition.LOST
    elif tickless > patience.tick:
        condition = Condition.FROZEN
    elif silent <= patience.progress:
        condition = Condition.MOVING
    else:
        condition = Condition.WAITING if sight.waiting else Condition.STUCK
    return Judged(sight, condition, silent)


def causes(ranks: Sequence[Judged]) -> list[Judged]:
    """The ranks at fault. Empty: none of those that are seen."""
    for condition in CAUSES:
        if found := [one for one in ranks if one.condition is condition]:
            return found
    return []


def verdict(ranks: Sequence[Judged], world_size: int) -> str:
    """Who is at fault, in a sentence or two."""
    found = causes(ranks)
    if found:
        return "The cause: " + "; ".join(map(str, found)) + "."
    if len(ranks) < world_size:
        return (
            "All ranks of this machine wait for others: the cause is on another machine, whose ranks report in the "
            "same folder, unless the network between them is down."
        )
    return (
        "All ranks wait for each other: they disagree about the order of transfers, or the network is down. "
        "parallel.check_splits=true and TORCH_DISTRIBUTED_DEBUG=DETAIL find which."
    )
