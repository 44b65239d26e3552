"""ZB-V (arXiv 2405.15362): a V of 2P stages without a bubble but its fill, in no more memory than 1F1B needs.

A rank has a stage on the way down, line "0", and one on the way up, line "1". It fills the V like DualPipeV, but
where that runs a forward and a backward as a pair, ZB-V runs I, W and the other line's F one after the other,
backward first: so no more than 2P chunks are ever kept, weight gradients included. Whatever F, I and W take, each
turn of the main part takes every rank the same time, and ranks do not wait for each other within it.
"""

from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain, cycle

from deepseek_train.schedule.action import Action, Kind, Schedule
from deepseek_train.schedule.placements import folded, too_small


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of P ranks and M micro-batches. Raises ValueError unless both are at least 1."""
    faults = problems(num_ranks, num_microbatches)
    if faults:
        raise ValueError("; ".join(faults))
    rows = tuple(tuple(_steps(rank, num_ranks, num_microbatches)) for rank in range(num_ranks))
    return Schedule("zb_v", folded(num_ranks, num_microbatches), rows)


def problems(num_ranks: int, num_microbatches: int) -> list[str]:
    """Why ZB-V cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    return too_small("ZB-V", num_ranks, num_microbatches)


def _words(rank: int, num_ranks: int) -> Iterator[str]:
    """Forwards and input gradients of endlessly many micro-batches: ``F0`` a forward of line 0, ``I1`` an input
    gradient of line 1.
    """
    from_turn = num_ranks - 1 - rank
    fill = ["F0"] * (2 * from_turn) + ["F0", "F1"] * (rank + 1) + ["I1", "F1"] * from_turn
    return chain(fill, cycle(["I1", "F0", "I0", "F1"]))


def _steps(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """While there are forwards, each input gradient is followed by the weight gradient of the oldest. Then the input
    gradients leave first, as many as are there without a wait, and the weight gradients fill the waits.
    """
    stages = {"0": rank, "1": 2 * num_ranks - 1 - rank}
    done: Counter[str] = Counter()
    queue: deque[Action] = deque()

    def weight() -> Action:
        oldest = queue.popleft()
        return Action(oldest.stage, Kind.BACKWARD_WEIGHT, oldest.microbatch)

    for word in _words(rank, num_ranks):
        if done.total() == 4 * num_microbatches:
            break
        if done[word] == num_microbatches:
            continue
        action = Action(stages[word[1]], Kind(word[0]), done[word])
        drains = done["F0"] + done["F1"] == 2 * num_microbatches
        if drains and len(queue) == 2 * (rank + 1):
            yield weight()
        yield action
        done[word] += 1
        if action.kind is Kind.BACKWARD_INPUT:
            queue.append(action)
            if not drains:
                yield weight()
    while queue:
        yield weight()
