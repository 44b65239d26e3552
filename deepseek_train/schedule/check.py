"""Prove that a schedule can run and does all the work exactly once."""

from collections import deque
from typing import assert_never

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule, Step
from deepseek_train.schedule.check_programs import check_programs
from deepseek_train.schedule.dataflow import Deadlock, actions_of, dependency_order
from deepseek_train.schedule.faults import ScheduleError, fault
from deepseek_train.schedule.lower import lower
from deepseek_train.schedule.windows import send_windows

__all__ = ["ScheduleError", "check"]


def check(schedule: Schedule) -> None:
    """Raise ``ScheduleError`` unless ``schedule`` can run to its end. What is proved:

    - every action stands on the rank its placement names;
    - every stage runs every micro-batch forward once, and backward once (B, or I and later W); a schedule
      without any backward is complete as well (evaluation);
    - a rank's weight gradients run in the order they were queued, and none is left over;
    - ranks that follow their rows and wait only for messages all reach the end, none in a circle of waits;
    - so do the programs the executor runs: on both ends of a link messages are sent and received in the same order,
      each once, and senders that wait for old sends are never in each other's way (``check_programs``).
    """
    placement, steps_R = schedule.placement, schedule.steps_R
    _check_placement(placement, len(steps_R))
    trains = any(a.kind is not Kind.FORWARD for steps in steps_R for step in steps for a in actions_of(step))
    for rank, steps in enumerate(steps_R):
        row = _Row(placement, rank)
        for index, step in enumerate(steps):
            if problem := row.take(step):
                raise fault(schedule.name, rank, steps, index, problem)
        if missing := row.missing(trains):
            raise fault(schedule.name, rank, steps, len(steps), missing)
    try:
        for _ in dependency_order(schedule):
            pass
    except Deadlock as deadlock:
        rank, (index, message) = min(deadlock.waits.items())
        others = ", ".join(f"{r} at {steps_R[r][i]}" for r, (i, _) in deadlock.waits.items() if r != rank)
        others = f"; also stuck, rank {others}" if others else ""
        problem = f"deadlock: waits for ever for the {message}{others}"
        raise fault(schedule.name, rank, steps_R[rank], index, problem) from None
    check_programs(schedule, lower(schedule), send_windows(schedule))


class _Row:
    """What one rank has done so far."""

    def __init__(self, placement: Placement, rank: int) -> None:
        self.placement = placement
        self.rank = rank
        self.forwards: set[tuple[int, int]] = set()
        self.backwards: set[tuple[int, int]] = set()
        self.queue: deque[tuple[int, int]] = deque()

    def take(self, step: Step) -> str:
        """Account for ``step``. Returns what is wrong with it; empty: nothing."""
        match step:
            case Action():
                return self._take(step)
            case Pair(Action(kind=Kind.FORWARD), Action(kind=Kind.BACKWARD)):
                # backward first: a pair's halves run at once, so its own forward is no forward before it
                return self._take(step.backward) or self._take(step.forward)
            case Pair():
                return "a pair is a forward (F) and a full backward (B), in this order"
            case _:
                assert_never(step)

    def _take(self, action: Action) -> str:
        placement, chunk = self.placement, (action.stage, action.microbatch)
        if not (
            0 <= action.stage < placement.num_stages and 0 <= action.microbatch < placement.num_microbatches
        ):
            sizes = f"{placement.num_stages} stages and {placement.num_microbatches} micro-batches"
            return f"{action} is outside the {sizes}"
        if placement.rank_of(*chunk) != self.rank:
            return f"{action} belongs to rank {placement.rank_of(*chunk)}"
        match action.kind:
            case Kind.FORWARD:
                if chunk in self.forwards:
                    return f"{action} runs twice"
                self.forwards.add(chunk)
            case Kind.BACKWARD | Kind.BACKWARD_INPUT:
                if chunk not in self.forwards:
                    return f"{action} has no forward before it"
                if chunk in self.backwards:
                    return f"{action} is a second backward"
                self.backwards.add(chunk)
                if action.kind is Kind.BACKWARD_INPUT:
                    self.queue.append(chunk)
            case Kind.BACKWARD_WEIGHT:
                if not self.queue:
                    return f"{action} has no input-only backward (I) queued before it"
                if chunk != self.queue[0]:
                    return f"{action} overtakes the oldest queued weight gradient, {_weight(*self.queue[0])}"
                self.queue.popleft()
            case _:
                assert_never(action.kind)
        return ""

    def missing(self, trains: bool) -> str:
        """What is still to be done at the end of the row; empty: nothing."""
        placement = self.placement
        for stage in placement.stages_of(self.rank):
            for microbatch in range(placement.num_microbatches):
                if placement.rank_of(stage, microbatch) != self.rank:
                    continue
                if (stage, microbatch) not in self.forwards:
                    return f"{Action(stage, Kind.FORWARD, microbatch)} is missing"
                if trains and (stage, microbatch) not in self.backwards:
                    return f"{Action(stage, Kind.BACKWARD, microbatch)} is missing"
        if self.queue:
            return f"{_weight(*self.queue[0])} is missing: its input-only backward is still queued"
        return ""


def _weight(stage: int, microbatch: int) -> Action:
    return Action(stage, Kind.BACKWARD_WEIGHT, microbatch)


def _check_placement(placement: Placement, num_rows: int) -> None:
    if num_rows != placement.num_ranks:
        raise ScheduleError(f"{num_rows} rows for {placement.num_ranks} ranks: write one row for each rank")
    if num_rows < 1 or placement.num_microbatches < 1:
        what = f"{num_rows} ranks and {placement.num_microbatches} micro-batches"
        raise ScheduleError(
            f"{what} have nothing to do: a schedule has 1 or more of both, and a row for each rank"
        )
    for stage, ranks in enumerate(placement.ranks_SX):
        outside = [rank for rank in ranks if not 0 <= rank < placement.num_ranks]
        if outside:
            raise ScheduleError(
                f"stage {stage} is placed on rank {outside[0]}, of only {placement.num_ranks} ranks"
            )
