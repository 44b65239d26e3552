"""DualPipeV: DualPipe cut in half at its middle (V3_SPEC B.7). One direction over 2R stages folded into a V on R
ranks; the way down meets the way up as the two directions of DualPipe meet, without a second copy of any stage.
"""

from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.eight_steps import Line, eight_steps
from deepseek_train.schedule.placements import folded, too_small


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of R ranks and M micro-batches. Raises ValueError unless R >= 1 and M >= 2 R."""
    faults = problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    rows = tuple(
        tuple(
            eight_steps(
                from_end=rank + 1,
                from_middle=num_ranks - 1 - rank,
                num_main=num_microbatches - 2 * num_ranks + rank + 1,
                lines=(Line(rank, 0), Line(2 * num_ranks - 1 - rank, 0)),
            )
        )
        for rank in range(num_ranks)
    )
    return Schedule("dualpipe_v", folded(num_ranks, num_microbatches), rows)


def problems(num_ranks: int, num_microbatches: int) -> list[str]:
    """Why DualPipeV cannot run R ranks and M micro-batches, each with its mend; empty: it can."""
    faults = too_small("DualPipeV", num_ranks, num_microbatches)
    if 1 <= num_microbatches < 2 * num_ranks:
        fewer = num_microbatches // 2
        ranks = f"{fewer} rank{'s' if fewer > 1 else ''} or fewer, " if fewer else ""
        faults.append(
            f"DualPipeV needs 2 micro-batches a rank to fill both ways of the V, got {num_microbatches} for "
            f"{num_ranks} ranks: use {2 * num_ranks} or more, {ranks}or zb_v"
        )
    return faults
