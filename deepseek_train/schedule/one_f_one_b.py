"""1F1B (PipeDream-Flush): one stage a rank; after a warm-up each rank alternates a forward and a backward."""

from collections.abc import Iterator

from deepseek_train.schedule.action import Action, Kind, Placement, Schedule, Step


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of P ranks and M micro-batches. Raises ValueError unless both are at least 1."""
    placement = straight(num_ranks, num_microbatches)
    return Schedule("1f1b", placement, tuple(tuple(_steps(placement, rank)) for rank in range(num_ranks)))


def straight(num_ranks: int, num_microbatches: int) -> Placement:
    """Stage s on rank s, one direction. Raises ValueError unless P >= 1 and M >= 1."""
    faults = problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    return Placement(num_ranks, num_microbatches, tuple((stage,) for stage in range(num_ranks)))


def problems(num_ranks: int, num_microbatches: int) -> list[str]:
    """Why 1F1B cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    named = {"pipeline rank": num_ranks, "micro-batch": num_microbatches}
    return [f"1F1B needs at least one {what}, got {n}: use 1 or more" for what, n in named.items() if n < 1]


def _steps(placement: Placement, rank: int) -> Iterator[Step]:
    count = placement.num_microbatches
    warm_up = min(placement.num_ranks - 1 - rank, count)
    forwards = [Action(rank, Kind.FORWARD, m) for m in range(count)]
    backwards = [Action(rank, Kind.BACKWARD, m) for m in range(count)]
    yield from forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[count - warm_up :]
