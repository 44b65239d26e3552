"""ZB-V (arXiv 2405.15362): a V of 2P stages without a bubble but its fill, in no more memory than 1F1B needs.

The paper's idea is a pattern that repeats every six units of time (F, I and W of both stages of a rank) and
in which no two actions of a rank meet. Ours: a micro-batch takes 4 units a stage forward and 2 a stage backward,
1 at the turn, and its loss waits a unit. Then F and I of a rank's down stage lie on even units and those of
its up stage on odd ones, always 4 and 2 apart modulo 6. A chunk on rank r is kept for 12P-8-6r units on the way
down and 6r+2 on the way up: on each rank the same sum, 2P chunks every six units.

The pattern gives the order of what repeats. A list scheduler with unit times fills in the beginning and the end:
a rank does what comes first in the pattern of what is ready, weight gradients when nothing is. No forward starts
while 2P chunks wait for their weight gradients, and the down stage leaves the last place to the up stage, so that
there is always a micro-batch that can go up and come back. Hence any P and M run to the end.
"""

from collections import deque
from dataclasses import dataclass, field

from deepseek_train.schedule.action import Action, Kind, Placement, Schedule
from deepseek_train.schedule.dataflow import Message, input_of, output_of
from deepseek_train.schedule.placements import folded, too_small

_PERIOD = 6  # units of time from one micro-batch to the next


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of P ranks and M micro-batches. Raises ValueError unless both are at least 1."""
    faults = problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    placement = folded(num_ranks, num_microbatches)
    ranks = [_Rank(placement, stages=placement.stages_of(rank)) for rank in range(num_ranks)]
    made: set[Message] = set()
    while any(rank.is_busy for rank in ranks):
        chosen = [
            rank.choose(made) for rank in ranks
        ]  # all at the same time: nobody sees the others' results
        for rank, action in zip(ranks, chosen, strict=True):
            if action is not None:
                rank.do(action)
                if message := output_of(placement, action):
                    made.add(message)
    return Schedule("zb_v", placement, tuple(tuple(rank.row) for rank in ranks))


def problems(num_ranks: int, num_microbatches: int) -> list[str]:
    """Why ZB-V cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    return too_small("ZB-V", num_ranks, num_microbatches)


@dataclass
class _Rank:
    """A rank at one unit of time."""

    placement: Placement
    stages: tuple[int, ...]  # on the way down, on the way up
    row: list[Action] = field(default_factory=list)
    done: dict[tuple[Kind, int], int] = field(default_factory=dict)  # (kind, stage) -> micro-batches
    queue: deque[Action] = field(default_factory=deque)
    held: int = 0  # chunks with a forward and no weight gradient yet

    @property
    def is_busy(self) -> bool:
        """Something is left to do."""
        return len(self.row) < 3 * len(self.stages) * self.placement.num_microbatches

    def choose(self, made: set[Message]) -> Action | None:
        """What to do next with the messages of the units before; None: wait."""
        lines = [(kind, stage) for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT) for stage in self.stages]
        following = [Action(stage, kind, self.done.get((kind, stage), 0)) for kind, stage in lines]
        ready = [action for action in following if self._can(action, made)]
        if ready:
            return min(ready, key=lambda action: _slot(action, self.placement.num_ranks))
        if self.queue:
            return Action(self.queue[0].stage, Kind.BACKWARD_WEIGHT, self.queue[0].microbatch)
        return None

    def do(self, action: Action) -> None:
        self.row.append(action)
        self.done[action.kind, action.stage] = action.microbatch + 1
        if action.kind is Kind.FORWARD:
            self.held += 1
        elif action.kind is Kind.BACKWARD_INPUT:
            self.queue.append(action)
        else:
            self.queue.popleft()
            self.held -= 1

    def _can(self, action: Action, made: set[Message]) -> bool:
        if action.microbatch == self.placement.num_microbatches:
            return False
        if action.kind is Kind.FORWARD and self.held >= self._places(action.stage):
            return False
        needed = input_of(self.placement, action)
        return needed is None or needed in made

    def _places(self, stage: int) -> int:
        down, up = self.stages
        up_is_over = self.done.get((Kind.FORWARD, up), 0) == self.placement.num_microbatches
        return self.placement.num_stages - (stage == down and not up_is_over)


def _slot(action: Action, num_ranks: int) -> int:
    """The unit of ``action``, an F or I, in the repeating pattern."""
    last = 2 * num_ranks - 1
    goes_up = action.stage >= num_ranks
    if action.kind is Kind.FORWARD:
        start = 4 * action.stage - 3 * goes_up
    else:
        loss = 4 * last - 3 + 2
        start = loss + 2 * (last - action.stage) - (not goes_up)
    return start + _PERIOD * action.microbatch
