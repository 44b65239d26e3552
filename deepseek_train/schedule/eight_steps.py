"""The eight steps of DualPipe and DualPipeV (V3_SPEC B.3): what a rank does, in its own words.

A rank holds two stages and sees two lines of micro-batches, "0" and "1". In DualPipe "0" is the direction that
enters at the nearer end of the pipeline; in DualPipeV it is the way down, to the last rank, and "1" the way up.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_train.schedule.action import Action, Kind, Pair, Step


@dataclass(frozen=True)
class Line:
    """One of a rank's two lines: micro-batches pass ``stage`` in ascending order from ``first_microbatch`` on."""

    stage: int
    first_microbatch: int


def eight_steps(from_end: int, from_middle: int, num_main: int, lines: tuple[Line, Line]) -> Iterator[Step]:
    """The steps of a rank whose lines "0" and "1" are ``lines``.

    ``from_end`` counts this rank and those before it, ``from_middle`` the ranks between it and the one where the
    two lines meet; ``num_main`` is the number of rounds in the main part.
    """
    next_forward = [line.first_microbatch for line in lines]
    next_backward = list(next_forward)
    queue: deque[Action] = deque()

    def bind(word: str) -> Action:
        kind = Kind(word[0])
        if kind is Kind.BACKWARD_WEIGHT:
            oldest = queue.popleft()
            return Action(oldest.stage, kind, oldest.microbatch)
        line = int(word[1])
        following = next_forward if kind is Kind.FORWARD else next_backward
        action = Action(lines[line].stage, kind, following[line])
        following[line] += 1
        if kind is Kind.BACKWARD_INPUT:
            queue.append(action)
        return action

    for words in _words(from_end, from_middle, num_main):
        forward, _, backward = words.partition("&")
        yield Pair(bind(forward), bind(backward)) if backward else bind(forward)


def _words(from_end: int, from_middle: int, num_main: int) -> Iterator[str]:
    """``F0``: a forward of line 0, ``F0&B1`` a pair, ``I1`` an input-only backward, ``W`` the oldest queued weight
    gradient.
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
