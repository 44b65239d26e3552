"""Where the search for a schedule starts from: schedules that stay within the limits, good ones among them."""

from dataclasses import fields
from random import Random

from deepseek_train.schedule.action import Action, Kind, Placement, Schedule, Step
from deepseek_train.schedule.catalog import NAMES, make_schedule, placement_of, problems
from deepseek_train.schedule.search.compiled import Compiled, Rows
from deepseek_train.schedule.search.list_scheduler import Policy, play
from deepseek_train.schedule.search.memory import Limits

_POLICIES = 60


def starts(work: Compiled, limits: Limits, seed: int) -> list[Rows]:
    """Rows within the limits: known schedules, one micro-batch after the other, and plays of many policies."""
    placement = work.placement
    known = [work.rows(schedule) for schedule in (*_known(placement), _one_by_one(placement))]
    known = [rows for rows in known if all(limits.allow(row, work.num_chunks) for row in rows)]
    lanes = max(sum(ranks.count(r) for ranks in placement.ranks_SX) for r in range(placement.num_ranks))
    if min(limits.activations, limits.held) < lanes:
        return known
    random, usual = Random(seed), Policy()
    names = [field.name for field in fields(Policy)]
    drawn = [
        Policy(*(getattr(usual, name) + random.gauss(0.0, 1.5) for name in names)) for _ in range(_POLICIES)
    ]
    return known + [play(work, limits, policy) for policy in (usual, *drawn)]


def _known(placement: Placement) -> list[Schedule]:
    """Schedules with a name that have this placement."""
    sizes = placement.num_ranks, placement.num_microbatches
    names = [name for name in NAMES if not problems(name, *sizes) and placement_of(name, *sizes) == placement]
    return [make_schedule(name, *sizes) for name in names]


def _one_by_one(placement: Placement) -> Schedule:
    """Each micro-batch forward through all stages and back before the next: slow, and no schedule keeps less."""
    steps_R: list[list[Step]] = [[] for _ in range(placement.num_ranks)]
    stages = range(placement.num_stages)
    for microbatch in range(placement.num_microbatches):
        for stage in stages:
            steps_R[placement.rank_of(stage, microbatch)].append(Action(stage, Kind.FORWARD, microbatch))
        for stage in reversed(stages):
            steps_R[placement.rank_of(stage, microbatch)].append(Action(stage, Kind.BACKWARD, microbatch))
    return Schedule("one_by_one", placement, tuple(map(tuple, steps_R)))
