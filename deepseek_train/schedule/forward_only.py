"""Forwards without backwards, for evaluation, over the same stages a training schedule uses."""

from itertools import product

from deepseek_train.schedule.action import Action, Kind, Placement, Schedule, Step


def forward_only(placement: Placement) -> Schedule:
    """Every micro-batch through every stage, forward. Works for any placement.

    Each action has a slot: its stage plus its micro-batch's place in the line of its direction. A stage's
    input always has an earlier slot, so ranks that work in the order of slots cannot wait for one another in
    a circle. Of one slot, the place in the line decides, whatever the direction: ranks that hold the same stages for
    opposite directions run them in the same order, as they must where they share experts.
    """
    per_direction = placement.num_microbatches // placement.num_directions

    def slot(chunk: tuple[int, int]) -> tuple[int, int]:
        stage, microbatch = chunk
        place = microbatch % per_direction
        return stage + place, place

    chunks = product(range(placement.num_stages), range(placement.num_microbatches))
    steps_R: list[list[Step]] = [[] for _ in range(placement.num_ranks)]
    for stage, microbatch in sorted(chunks, key=slot):
        steps_R[placement.rank_of(stage, microbatch)].append(Action(stage, Kind.FORWARD, microbatch))
    return Schedule("forward_only", placement, tuple(map(tuple, steps_R)))
