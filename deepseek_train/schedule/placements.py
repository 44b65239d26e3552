"""Where one-directional schedules put their stages: in a row, in rounds, or folded into a V."""

from deepseek_train.schedule.action import Placement


def straight(num_ranks: int, num_microbatches: int) -> Placement:
    """Stage s on rank s. Raises ValueError unless P >= 1 and M >= 1."""
    return looped(num_ranks, num_microbatches, 1)


def looped(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Placement:
    """V P stages, stage s on rank s mod P: a micro-batch passes all ranks V times. Raises ValueError unless P, M
    and V are at least 1.
    """
    _refuse(too_small("a looped placement", num_ranks, num_microbatches, stages_per_rank))
    stages = range(num_ranks * stages_per_rank)
    return Placement(num_ranks, num_microbatches, tuple((stage % num_ranks,) for stage in stages))


def folded(num_ranks: int, num_microbatches: int) -> Placement:
    """2 P stages in the shape of a V, stages r and 2P-1-r on rank r: down to the last rank and up again, so rank 0
    holds both ends of the model. Raises ValueError unless P >= 1 and M >= 1.
    """
    _refuse(too_small("a folded placement", num_ranks, num_microbatches))
    ranks = range(num_ranks)
    return Placement(num_ranks, num_microbatches, tuple((rank,) for rank in (*ranks, *reversed(ranks))))


def too_small(what: str, num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> list[str]:
    """Which of the sizes are below 1, each with its mend. ``what`` needs them."""
    named = {"pipeline rank": num_ranks, "micro-batch": num_microbatches, "stage a rank": stages_per_rank}
    return [f"{what} needs at least one {part}, got {n}: use 1 or more" for part, n in named.items() if n < 1]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError("; ".join(faults))
