"""When things happened: what simulating *and* running a schedule both yield."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.overlap import Lane


@dataclass(frozen=True)
class Span:
    """One chunk of work of one rank. Times in seconds from the start of the step. The halves of a pair that really
    overlap share their time: their spans overlap too."""

    rank: int
    kind: Kind
    stage: int
    microbatch: int
    start: float
    end: float
    paired: bool = False  # half of an overlapped forward-backward pair


@dataclass(frozen=True)
class PhaseSpan:
    """One phase of a chunk, on one lane of its rank; only running a schedule knows these. ``kind`` is F for a phase run
    forward, I for its input gradients, W for its weight gradients."""

    rank: int
    lane: Lane
    name: str  # of the phase: "attend", "dispatch", ...; "weights" for queued weight gradients
    kind: Kind
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Spans of all ranks, each rank's in the order they started."""

    num_ranks: int
    spans: tuple[Span, ...]
    phases: tuple[PhaseSpan, ...] = ()

    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max(s.end for s in self.spans) - min(s.start for s in self.spans)

    def busy(self, rank: int) -> float:
        """Seconds ``rank`` spent inside its spans; time that two of them share counts once."""
        return _length(_merged((s.start, s.end) for s in self.spans if s.rank == rank))

    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time."""
        busy = sum(self.busy(rank) for rank in range(self.num_ranks))
        return 1.0 - busy / (self.num_ranks * self.makespan())

    def exposed_communication(self, rank: int, begin: float = -math.inf, end: float = math.inf) -> float:
        """Seconds between ``begin`` and ``end`` in which ``rank``'s communication lane was busy and its compute lane
        was not: communication that no computation hid. 0 where no phases are known."""
        return _length(self.exposed_intervals(rank, begin, end))

    def exposed_intervals(
        self, rank: int, begin: float = -math.inf, end: float = math.inf
    ) -> list[tuple[float, float]]:
        """(start, end) of ``exposed_communication``, in order."""
        busy = {
            lane: _merged(
                (max(p.start, begin), min(p.end, end))
                for p in self.phases
                if p.rank == rank and p.lane is lane and p.end > begin and p.start < end
            )
            for lane in Lane
        }
        exposed = []
        for start, stop in busy[Lane.COMMUNICATION]:
            for hidden_from, hidden_to in busy[Lane.COMPUTE]:
                if hidden_to <= start or hidden_from >= stop:
                    continue
                if start < hidden_from:
                    exposed.append((start, hidden_from))
                start = min(hidden_to, stop)
            if start < stop:
                exposed.append((start, stop))
        return exposed


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times as ``intervals``, in order and apart."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)
