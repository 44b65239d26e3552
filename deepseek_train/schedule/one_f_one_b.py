"""1F1B (PipeDream-Flush): one stage a rank; after a warm-up each rank alternates a forward and a backward."""

from collections.abc import Iterator

from deepseek_train.schedule.action import Action, Kind, Schedule, Step
from deepseek_train.schedule.placements import straight, too_small


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of P ranks and M micro-batches. Raises ValueError unless both are at least 1."""
    faults = problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    rows = tuple(tuple(_steps(rank, num_ranks, num_microbatches)) for rank in range(num_ranks))
    return Schedule("1f1b", straight(num_ranks, num_microbatches), rows)


def problems(num_ranks: int, num_microbatches: int) -> list[str]:
    """Why 1F1B cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    return too_small("1F1B", num_ranks, num_microbatches)


def alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> Iterator[Action]:
    """``warm_up`` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    yield from forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(backwards) - warm_up :]


def _steps(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Step]:
    forwards = [Action(rank, Kind.FORWARD, m) for m in range(num_microbatches)]
    backwards = [Action(rank, Kind.BACKWARD, m) for m in range(num_microbatches)]
    yield from alternate(forwards, backwards, warm_up=num_ranks - 1 - rank)
