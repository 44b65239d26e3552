"""Stretches of the stream that a run jumps over: data that it was rolled back from."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Window:
    """Sequences ``first`` up to, and without, ``end``, by their numbers in the stream."""

    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end:
            raise ValueError(
                f"a window from sequence {self.first} to {self.end} holds none; write first < end"
            )

    def __str__(self) -> str:
        return f"[{self.first}, {self.end})"


def number_outside(windows: Sequence[Window], k: int) -> int:
    """Number in the stream of the ``k``-th sequence (from 0) that lies in no window. Windows may overlap."""
    jumped = 0  # everything before it was looked at
    for window in sorted(windows):
        if k < window.first:
            break
        k += max(0, window.end - max(window.first, jumped))
        jumped = max(jumped, window.end)
    return k
