"""ZB-H1 (arXiv 2401.10241), called ZB1P in the V3 report: 1F1B whose weight gradients fill the bubble.

Every rank runs forwards and input gradients in the order of 1F1B. Rank r lets r weight gradients wait: then
forwards not yet backward, P - r of them, and queued weight gradients add up to P micro-batches on every rank,
which is what 1F1B keeps on its first. While the pipeline drains, each input gradient leaves at once for the rank
before, and the weight gradients are what a rank does while it waits for the next one.
"""

from collections.abc import Iterator
from itertools import islice

from deepseek_train.schedule.action import Action, Kind, Schedule, Step
from deepseek_train.schedule.one_f_one_b import alternate
from deepseek_train.schedule.placements import straight, too_small


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of P ranks and M micro-batches. Raises ValueError unless both are at least 1."""
    faults = problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    rows = tuple(tuple(_steps(rank, num_ranks, num_microbatches)) for rank in range(num_ranks))
    return Schedule("zb_h1", straight(num_ranks, num_microbatches), rows)


def problems(num_ranks: int, num_microbatches: int) -> list[str]:
    """Why ZB-H1 cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    return too_small("ZB-H1", num_ranks, num_microbatches)


def _steps(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Step]:
    microbatches = range(num_microbatches)
    forwards = [Action(rank, Kind.FORWARD, m) for m in microbatches]
    backwards = [Action(rank, Kind.BACKWARD_INPUT, m) for m in microbatches]
    weights = iter([Action(rank, Kind.BACKWARD_WEIGHT, m) for m in microbatches])
    for action in alternate(forwards, backwards, warm_up=num_ranks - 1 - rank):
        yield action
        if action.kind is Kind.BACKWARD_INPUT and action.microbatch >= rank:
            yield from islice(weights, 1)
    yield from weights
