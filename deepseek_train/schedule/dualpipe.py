"""DualPipe: micro-batches enter the pipeline at both ends at once (V3 report section 3.2.1, figure 5).

Every rank holds two stages, r and P-1-r, one for each direction. What a rank does depends only on its
distance h from the nearer end. Written from its own point of view, "0" is the direction that enters at the
nearer end, "1" the other one, so the second half of the ranks is the mirror image of the first.
"""

from collections import deque
from collections.abc import Iterator

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule, Step


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
            f"got {num_ranks}: use {max(2, num_ranks + num_ranks % 2)} ranks, or 1f1b"
        )
    if num_microbatches < 2 or num_microbatches % 2:
        faults.append(
            f"DualPipe feeds half of the micro-batches from each end and needs an even number of them, "
            f"got {num_microbatches}: use {max(2, num_microbatches + num_microbatches % 2)}, or 1f1b"
        )
    return faults


def _eight_steps(from_end: int, from_middle: int, num_main: int) -> Iterator[str]:
    """The steps of a rank in its own words: ``F0`` a forward of the nearer direction, ``F0&B1`` a pair, ``I``
    an input-only backward, ``W`` the oldest queued weight gradient.

    ``from_end`` counts this rank and those outside it, ``from_middle`` the ranks between it and the middle.
    """
    # 1 to 3: fill; weight gradients of the first backwards wait so that their input gradients leave early
    yield from ["F0"] * (2 * from_middle)
    yield from ["F0", "F1"] * from_end
    yield from ["I1", "W", "F1"] * from_middle
    # 4: the main part; the middle ranks run their first two apart, which makes the bubble smaller
    yield from ["F0&B1"] if from_middle else ["F0", "B1"]
    yield from ["F1&B0", "F0&B1"] * (num_main - 1)
    yield "F1&B0"
    # 5 to 8: drain; half-way through step 6 weight gradients begin to wait again
    yield from ["B1", "F1&B0"] * from_middle
    yield from (["B1", "B0"] * from_end)[:from_end]
    yield from (["I1", "I0"] * from_end)[from_end:]
    yield from ["W", "I0"] * from_middle
    yield from ["W"] * from_end


def _steps(placement: Placement, rank: int) -> Iterator[Step]:
    """Give the words of rank's eight steps their stages and micro-batches."""
    num_ranks, half = placement.num_ranks, placement.num_microbatches // 2
    from_end = min(rank, num_ranks - 1 - rank) + 1
    second_half = rank >= num_ranks // 2
    forwards, backwards = [0, half], [0, half]  # the next micro-batch of each direction
    queue: deque[Action] = deque()

    def bind(word: str) -> Action:
        kind = Kind(word[0])
        if kind is Kind.BACKWARD_WEIGHT:
            oldest = queue.popleft()
            return Action(oldest.stage, kind, oldest.microbatch)
        direction = int(word[1]) ^ second_half
        stage = num_ranks - 1 - rank if direction else rank
        next_microbatch = forwards if kind is Kind.FORWARD else backwards
        action = Action(stage, kind, next_microbatch[direction])
        next_microbatch[direction] += 1
        if kind is Kind.BACKWARD_INPUT:
            queue.append(action)
        return action

    for words in _eight_steps(from_end, num_ranks // 2 - from_end, half - num_ranks + from_end):
        forward, _, backward = words.partition("&")
        yield Pair(bind(forward), bind(backward)) if backward else bind(forward)
