"""How a timeline falls into rows: what the drawings in text, in pictures and for Perfetto have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from deepseek_train.schedule.timeline import Span, Timeline


class Timed(Protocol):
    """Anything that takes time: a ``Span`` or a ``PhaseSpan``."""

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


T = TypeVar("T", bound=Timed)


def pairs(spans: Sequence[Span]) -> list[tuple[Span, ...]]:
    """Spans of one rank in order, the two halves of an overlapped pair together."""
    groups: list[tuple[Span, ...]] = []
    waiting: Span | None = None
    for span in spans:
        if not span.paired:
            groups.append((span,))
        elif waiting is None:
            waiting = span
        else:
            groups.append((waiting, span))
            waiting = None
    return groups if waiting is None else [*groups, (waiting,)]


def share_time(group: Sequence[Span]) -> bool:
    """Whether the halves of a pair really ran at once (a simulated pair's run in turn)."""
    return len(group) == 2 and min(s.end for s in group) > max(s.start for s in group)


def reverse_microbatches(timeline: Timeline) -> frozenset[int]:
    """Micro-batches that flow towards rank 0: their first stage is on a higher rank than their last."""
    ends: dict[int, tuple[Span, Span]] = {}
    for span in timeline.spans:
        first, last = ends.get(span.microbatch, (span, span))
        ends[span.microbatch] = (min(first, span, key=_stage), max(last, span, key=_stage))
    return frozenset(m for m, (first, last) in ends.items() if first.rank > last.rank)


@dataclass(frozen=True)
class Tones:
    """Which spans are drawn in the second tone. Of two directions, those towards rank 0; of one direction, those of
    all but the first of a rank's stages: without it the same micro-batch would stand twice in a row."""

    reverse: frozenset[int]  # micro-batches
    first_stage: dict[int, int]  # by rank
    stages: int  # most on a rank

    @property
    def used(self) -> bool:
        return bool(self.reverse) or self.stages > 1

    @property
    def names(self) -> tuple[str, str]:
        """What the first and the second tone mean."""
        if self.reverse:
            return "first rank to last", "last rank to first"
        return "first stage of the rank", "second stage" if self.stages == 2 else "later stages"

    def is_second(self, span: Span) -> bool:
        if self.reverse:
            return span.microbatch in self.reverse
        return span.stage > self.first_stage[span.rank]


def tones(timeline: Timeline) -> Tones:
    """How to tell ``timeline``'s spans apart."""
    stages: dict[int, set[int]] = {}
    for span in timeline.spans:
        stages.setdefault(span.rank, set()).add(span.stage)
    first = {rank: min(held) for rank, held in stages.items()}
    return Tones(reverse_microbatches(timeline), first, max(map(len, stages.values()), default=0))


def stack(items: Sequence[T]) -> list[list[T]]:
    """``items`` in as few rows as needed for none to overlap inside its row, each row in order of time."""
    rows: list[list[T]] = []
    for item in sorted(items, key=lambda item: (item.start, item.end)):
        row = next((row for row in rows if row[-1].end <= item.start), None)
        if row is None:
            rows.append([item])
        else:
            row.append(item)
    return rows


def _stage(span: Span) -> int:
    return span.stage
