"""When things happened: what simulating *and* running a schedule both yield."""

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
    name: str  # of the phase: "attend", "dispatch", ...; "receive" and "send" for messages between stages
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
        total, until = 0.0, float("-inf")
        for start, end in sorted((s.start, s.end) for s in self.spans if s.rank == rank):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time."""
        busy = sum(self.busy(rank) for rank in range(self.num_ranks))
        return 1.0 - busy / (self.num_ranks * self.makespan())
