"""When things happened: what simulating *and* running a schedule both yield."""

from dataclasses import dataclass

from deepseek_train.schedule.action import Kind


@dataclass(frozen=True)
class Span:
    """One piece of work of one rank. Times in seconds from the start of the step."""

    rank: int
    kind: Kind
    stage: int
    microbatch: int
    start: float
    end: float
    paired: bool = False  # half of an overlapped forward-backward pair


@dataclass(frozen=True)
class Timeline:
    """Spans of all ranks, each rank's in the order they ran."""

    num_ranks: int
    spans: tuple[Span, ...]

    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max(s.end for s in self.spans) - min(s.start for s in self.spans)

    def busy(self, rank: int) -> float:
        """Seconds ``rank`` spent inside its spans."""
        return sum(s.end - s.start for s in self.spans if s.rank == rank)

    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time."""
        busy = sum(self.busy(rank) for rank in range(self.num_ranks))
        return 1.0 - busy / (self.num_ranks * self.makespan())
