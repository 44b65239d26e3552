"""GPipe (arXiv 1811.06965): one stage a rank; all forwards, then all backwards.

Its bubble is that of 1F1B, its memory grows with the number of micro-batches: it is here to be compared with.
"""

from deepseek_train.schedule.action import Action, Kind, Schedule
from deepseek_train.schedule.placements import straight, too_small


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of P ranks and M micro-batches. Raises ValueError unless both are at least 1."""
    faults = problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    work = [(kind, m) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(num_microbatches)]
    rows = tuple(tuple(Action(rank, kind, m) for kind, m in work) for rank in range(num_ranks))
    return Schedule("gpipe", straight(num_ranks, num_microbatches), rows)


def problems(num_ranks: int, num_microbatches: int) -> list[str]:
    """Why GPipe cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    return too_small("GPipe", num_ranks, num_microbatches)
