"""How long a schedule takes and how much it keeps, worked out without running it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import assert_never

from deepseek_train.schedule.action import Action, Kind, Pair, Schedule, Step
from deepseek_train.schedule.dataflow import Message, actions_of, dependency_order, inputs_of, outputs_of
from deepseek_train.schedule.timeline import Span, Timeline

Seconds = float | tuple[float, ...]  # the same for all stages, or one for each


@dataclass(frozen=True)
class Durations:
    """Seconds of each kind of work on one micro-batch. A full backward takes ``backward_input +
    backward_weight``.
    """

    forward: Seconds
    backward_input: Seconds
    backward_weight: Seconds
    overlapped: Seconds  # a whole pair with both halves in this stage; of two stages: ``seconds``
    latency: float = 0.0  # of a message to another rank


def simulate(schedule: Schedule, durations: Durations) -> Timeline:
    """Run every rank's steps as soon as their messages are there. ``schedule`` has passed ``check``.

    The halves of a pair start with what both need and hand over their messages when both are done; in the
    timeline they share the pair's time in proportion to what each would take alone.
    """
    placement = schedule.placement
    spans_R: list[list[Span]] = [[] for _ in schedule.steps_R]
    free_R = [0.0] * len(schedule.steps_R)
    made_at: dict[Message, float] = {}
    for rank, index in dependency_order(schedule):
        step = schedule.steps_R[rank][index]
        arrivals = [
            made_at[m] + (0.0 if m.is_local else durations.latency) for m in inputs_of(placement, step)
        ]
        spans = _spans(rank, step, max([free_R[rank], *arrivals]), durations)
        spans_R[rank] += spans
        free_R[rank] = spans[-1].end
        made_at.update((message, free_R[rank]) for message in outputs_of(placement, step))
    return Timeline(len(schedule.steps_R), tuple(span for spans in spans_R for span in spans))


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """For each rank the most micro-batches whose forward has run and whose backward (B or I) has not, a pair
    counting as both at once. What weight gradients still hold after I is in ``peak_weight_queue``.
    """

    def change(action: Action) -> int:
        match action.kind:
            case Kind.FORWARD:
                return 1
            case Kind.BACKWARD | Kind.BACKWARD_INPUT:
                return -1
            case Kind.BACKWARD_WEIGHT:
                return 0
            case _:
                assert_never(action.kind)

    return _peak(schedule, change)


def peak_weight_queue(schedule: Schedule) -> tuple[int, ...]:
    """For each rank the most weight gradients queued: each holds inputs and output gradients of every linear
    of its chunk.
    """

    def change(action: Action) -> int:
        match action.kind:
            case Kind.BACKWARD_INPUT:
                return 1
            case Kind.BACKWARD_WEIGHT:
                return -1
            case Kind.FORWARD | Kind.BACKWARD:
                return 0
            case _:
                assert_never(action.kind)

    return _peak(schedule, change)


def _peak(schedule: Schedule, change: Callable[[Action], int]) -> tuple[int, ...]:
    changes_R = [[change(a) for step in steps for a in actions_of(step)] for steps in schedule.steps_R]
    return tuple(max(accumulate(changes, initial=0)) for changes in changes_R)


def seconds(step: Step, durations: Durations) -> float:
    """How long a step takes. A pair of two stages takes its halves' own times less the mean of what pairing saves
    in either stage, so that a light forward does not make a heavy backward cheap."""
    match step:
        case Action():
            return _alone(step, durations)
        case Pair(forward, backward):
            ahead = (_alone(half, durations) for half in (forward, Action(backward.stage, Kind.FORWARD, 0)))
            behind = (_alone(half, durations) for half in (backward, Action(forward.stage, Kind.BACKWARD, 0)))
            overlapped = (_of_stage(durations.overlapped, half.stage) for half in (forward, backward))
            (f, other_f), (b, other_b) = ahead, behind
            return max(f, b, (sum(overlapped) + (f - other_f) + (b - other_b)) / 2)
        case _:
            assert_never(step)


def _spans(rank: int, step: Step, start: float, durations: Durations) -> list[Span]:
    match step:
        case Action(stage, kind, microbatch):
            return [Span(rank, kind, stage, microbatch, start, start + _alone(step, durations))]
        case Pair(forward, backward):
            total = seconds(step, durations)
            alone = _alone(forward, durations), _alone(backward, durations)
            middle = start + (total * alone[0] / sum(alone) if sum(alone) else 0.0)
            return [
                Span(rank, forward.kind, forward.stage, forward.microbatch, start, middle, paired=True),
                Span(
                    rank,
                    backward.kind,
                    backward.stage,
                    backward.microbatch,
                    middle,
                    start + total,
                    paired=True,
                ),
            ]
        case _:
            assert_never(step)


def _alone(action: Action, durations: Durations) -> float:
    """Seconds ``action`` takes outside a pair."""
    stage = action.stage
    match action.kind:
        case Kind.FORWARD:
            return _of_stage(durations.forward, stage)
        case Kind.BACKWARD:
            return _of_stage(durations.backward_input, stage) + _of_stage(durations.backward_weight, stage)
        case Kind.BACKWARD_INPUT:
            return _of_stage(durations.backward_input, stage)
        case Kind.BACKWARD_WEIGHT:
            return _of_stage(durations.backward_weight, stage)
        case _:
            assert_never(action.kind)


def _of_stage(seconds: Seconds, stage: int) -> float:
    return seconds[stage] if isinstance(seconds, tuple) else seconds
