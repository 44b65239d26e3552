"""How a timeline falls into rows: what the drawings in text, in pictures and for Perfetto have in common."""

from collections.abc import Sequence
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
