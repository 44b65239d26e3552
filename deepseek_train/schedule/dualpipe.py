"""DualPipe: micro-batches enter the pipeline at both ends at once (V3 report section 3.2.1, figure 5).

Every rank holds two stages, r and P-1-r, one for each direction. What a rank does depends only on its
distance h from the nearer end, so the second half of the ranks is the mirror image of the first.
"""

from collections.abc import Iterator

from deepseek_train.schedule.action import Placement, Schedule, Step
from deepseek_train.schedule.eight_steps import Line, eight_steps


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """The bidirectional schedule of P ranks and M micro-batches, both directions together.

    Raises ValueError unless P and M are even and M >= 2 P.
    """
    faults = problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    placement = mirrored(num_ranks, num_microbatches)
    steps_R = tuple(tuple(_steps(placement, rank)) for rank in range(num_ranks))
    return Schedule("dualpipe", placement, steps_R)


def mirrored(num_ranks: int, num_microbatches: int) -> Placement:
    """Stage s on rank s for direction 0, on rank P-1-s for direction 1. Raises ValueError unless P and M are
    even.
    """
    faults = _placement_problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    ranks_SX = tuple((stage, num_ranks - 1 - stage) for stage in range(num_ranks))
    return Placement(num_ranks, num_microbatches, ranks_SX)


def problems(num_ranks: int, num_microbatches: int) -> list[str]:
    """Why DualPipe cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    faults = _placement_problems(num_ranks, num_microbatches)
    if num_microbatches < 2 * num_ranks:
        faults.append(
            f"DualPipe needs 2 micro-batches a rank to fill the pipeline from both ends, "
            f"got {num_microbatches} for {num_ranks} ranks: use {2 * num_ranks} or more, fewer ranks, or 1f1b"
        )
    return faults


def _placement_problems(num_ranks: int, num_microbatches: int) -> list[str]:
    faults = []
    if num_ranks < 2 or num_ranks % 2:
        faults.append(
            f"DualPipe pairs rank r with rank P-1-r and needs an even number of pipeline ranks, "
            f"got {num_ranks}: use {_even_neighbours(num_ranks)} ranks, or 1f1b"
        )
    if num_microbatches < 2 or num_microbatches % 2:
        faults.append(
            f"DualPipe feeds half of the micro-batches from each end and needs an even number of them, "
            f"got {num_microbatches}: use {max(2, num_microbatches + num_microbatches % 2)}, or 1f1b"
        )
    return faults


def _even_neighbours(count: int) -> str:
    return f"{count - 1} or {count + 1}" if count > 2 else "2"


def _steps(placement: Placement, rank: int) -> Iterator[Step]:
    num_ranks, half = placement.num_ranks, placement.num_microbatches // 2
    from_end = min(rank, num_ranks - 1 - rank) + 1
    lines = Line(rank, 0), Line(num_ranks - 1 - rank, half)
    if rank >= num_ranks // 2:  # the nearer end is the last rank: direction 1 is line 0
        lines = lines[::-1]
    return eight_steps(from_end, num_ranks // 2 - from_end, half - num_ranks + from_end, lines)
