"""What flows between actions: the only dependencies a schedule has to respect.

A forward hands its activation to the next stage, a backward its input gradient to the stage before, and the
last stage's forward hands the gradient of its loss to its own backward. All three are ``Message``s. Weight
gradients need no message: their inputs wait in the rank's own queue.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule, Step


class MessageKind(Enum):
    """Which tensor a message carries."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


@dataclass(frozen=True)
class Message:
    """One tensor on its way to ``stage``, the stage that receives it. ``source`` and ``target`` are pipeline
    ranks.
    """

    kind: MessageKind
    stage: int
    microbatch: int
    source: int
    target: int

    @property
    def is_local(self) -> bool:
        """Stays on its rank: nothing to send."""
        return self.source == self.target

    def __str__(self) -> str:
        what = f"{self.kind.value} of micro-batch {self.microbatch}"
        return f"{what} for stage {self.stage} from rank {self.source}"


class Deadlock(ValueError):
    """No rank can go on. ``waits``: for each blocked rank the index of its step and the message it lacks."""

    def __init__(self, waits: dict[int, tuple[int, Message]]) -> None:
        super().__init__("; ".join(f"rank {r}, step {i} waits for the {m}" for r, (i, m) in waits.items()))
        self.waits = waits


def actions_of(step: Step) -> tuple[Action, ...]:
    """The one or two actions of a step, the forward of a pair first."""
    match step:
        case Action():
            return (step,)
        case Pair(forward, backward):
            return (forward, backward)
        case _:
            assert_never(step)


def input_of(placement: Placement, action: Action) -> Message | None:
    """The message ``action`` consumes; None for the first stage's forward and for weight gradients."""
    stage, microbatch = action.stage, action.microbatch
    target = placement.rank_of(stage, microbatch)
    match action.kind:
        case Kind.FORWARD:
            if stage == 0:
                return None
            source = placement.rank_of(stage - 1, microbatch)
            return Message(MessageKind.ACTIVATION, stage, microbatch, source, target)
        case Kind.BACKWARD | Kind.BACKWARD_INPUT:
            source = placement.rank_of(min(stage + 1, placement.num_stages - 1), microbatch)
            return Message(MessageKind.GRADIENT, stage, microbatch, source, target)
        case Kind.BACKWARD_WEIGHT:
            return None
        case _:
            assert_never(action.kind)


def output_of(placement: Placement, action: Action) -> Message | None:
    """The message ``action`` produces; None for the first stage's backward and for weight gradients."""
    stage, microbatch = action.stage, action.microbatch
    source = placement.rank_of(stage, microbatch)
    match action.kind:
        case Kind.FORWARD if stage == placement.num_stages - 1:
            return Message(MessageKind.GRADIENT, stage, microbatch, source, source)
        case Kind.FORWARD:
            target = placement.rank_of(stage + 1, microbatch)
            return Message(MessageKind.ACTIVATION, stage + 1, microbatch, source, target)
        case Kind.BACKWARD | Kind.BACKWARD_INPUT:
            if stage == 0:
                return None
            target = placement.rank_of(stage - 1, microbatch)
            return Message(MessageKind.GRADIENT, stage - 1, microbatch, source, target)
        case Kind.BACKWARD_WEIGHT:
            return None
        case _:
            assert_never(action.kind)


def inputs_of(placement: Placement, step: Step) -> tuple[Message, ...]:
    """Messages a step consumes; a pair waits for both of its halves' inputs before it starts."""
    messages = (input_of(placement, action) for action in actions_of(step))
    return tuple(m for m in messages if m is not None)


def outputs_of(placement: Placement, step: Step) -> tuple[Message, ...]:
    """Messages a step produces, all at its end."""
    messages = (output_of(placement, action) for action in actions_of(step))
    return tuple(m for m in messages if m is not None)


def dependency_order(schedule: Schedule) -> Iterator[tuple[int, int]]:
    """Yield (rank, step index) of all steps, each after the steps whose messages it needs and after its
    rank's earlier steps. Raises ``Deadlock`` once nothing can go on although steps are left.
    """
    placement, steps_R = schedule.placement, schedule.steps_R
    done_R = [0] * len(steps_R)
    made: set[Message] = set()
    waits: dict[Message, int] = {}
    runnable = deque(range(len(steps_R)))
    while runnable:
        rank = runnable.popleft()
        for index in range(done_R[rank], len(steps_R[rank])):
            step = steps_R[rank][index]
            missing = next((m for m in inputs_of(placement, step) if m not in made), None)
            if missing is not None:
                waits[missing] = rank
                break
            yield rank, index
            done_R[rank] = index + 1
            for message in outputs_of(placement, step):
                made.add(message)
                if message in waits:
                    runnable.append(waits.pop(message))
    if waits:
        raise Deadlock({rank: (done_R[rank], message) for message, rank in waits.items()})
