"""Interleaved 1F1B (arXiv 2104.04473): V stages a rank in rounds, which makes the bubble V times smaller.

Micro-batches go in groups: all of a group pass the rank's first stage, then all its second, and so on; backward
the same from the last stage. A group has at least P micro-batches, because its first comes back from the last
rank P chunks later: with fewer the ranks would wait in every round. Megatron asks for groups of exactly P. Here
M micro-batches make M div P groups as equal as possible, so any M runs.
"""

from collections.abc import Iterator

from deepseek_train.schedule.action import Action, Kind, Placement, Schedule
from deepseek_train.schedule.one_f_one_b import alternate
from deepseek_train.schedule.placements import looped, too_small


def interleaved(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """The schedule of P ranks, M micro-batches and V stages a rank; V = 1 is 1F1B. Raises ValueError unless all are
    at least 1.
    """
    faults = problems(num_ranks, num_microbatches, stages_per_rank)
    if faults:
        raise ValueError("; ".join(faults))
    placement = looped(num_ranks, num_microbatches, stages_per_rank)
    rows = tuple(tuple(_steps(placement, rank)) for rank in range(num_ranks))
    return Schedule("interleaved_1f1b", placement, rows)


def problems(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> list[str]:
    """Why interleaved 1F1B cannot run P ranks, M micro-batches and V stages a rank, each with its mend; empty: it
    can.
    """
    return too_small("interleaved 1F1B", num_ranks, num_microbatches, stages_per_rank)


def group_sizes(num_ranks: int, num_microbatches: int) -> tuple[int, ...]:
    """Micro-batches of each group, the larger groups first; at least P each, or one group of fewer than P."""
    count = max(1, num_microbatches // num_ranks)
    size, larger = divmod(num_microbatches, count)
    return (size + 1,) * larger + (size,) * (count - larger)


def _steps(placement: Placement, rank: int) -> Iterator[Action]:
    """The last rank can run its first backward once the first group is through all stages but its last. The ranks
    before it are further from there, twice: a forward more on the way down, a backward on the way up.
    """
    num_ranks, stages = placement.num_ranks, placement.stages_of(rank)
    groups = group_sizes(num_ranks, placement.num_microbatches)
    hops = (num_ranks - 1 - rank) * (2 if len(stages) > 1 else 1)
    forwards = _in_groups(groups, stages, Kind.FORWARD)
    backwards = _in_groups(groups, stages[::-1], Kind.BACKWARD)
    yield from alternate(forwards, backwards, warm_up=(len(stages) - 1) * groups[0] + hops)


def _in_groups(groups: tuple[int, ...], stages: tuple[int, ...], kind: Kind) -> list[Action]:
    actions, first = [], 0
    for size in groups:
        actions += [Action(stage, kind, m) for stage in stages for m in range(first, first + size)]
        first += size
    return actions
