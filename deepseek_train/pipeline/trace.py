"""When this rank did what: spans for a Timeline, from the executor's own clock."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event
from typing import Protocol

import torch

from deepseek_train.phases.parcel import Pending
from deepseek_train.schedule.action import Action
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.timeline import PhaseSpan, Span
from deepseek_train.watch.whereabouts import Whereabouts

Instant = Callable[[], float]  # seconds since the trace began, known once the step is over


class Clock(Protocol):
    """Marks instants on the compute lane, and the end of transfers beside it."""

    def now(self) -> Instant: ...
    def end_of(self, pending: Pending) -> Instant: ...


class HostClock:
    """For ranks that compute on the host. A transfer's end is noted by the thread that moved it."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()

    def now(self) -> Instant:
        at = time.perf_counter() - self._origin
        return lambda: at

    def end_of(self, pending: Pending) -> Instant:
        ended, noted = [], Event()

        def note() -> None:
            ended.append(time.perf_counter() - self._origin)
            noted.set()

        def at() -> float:  # holds the instant, not what has arrived
            noted.wait()
            return ended[0]

        pending.when_done(note)
        return at


class DeviceClock:
    """For CUDA: events in the compute stream, and in a side stream that waits for transfers. Never stops the device."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._origin = self._mark()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def now(self) -> Instant:
        return self._since_origin(self._mark())

    def end_of(self, pending: Pending) -> Instant:
        with torch.cuda.stream(self._side):
            pending.wait()
            return self._since_origin(self._mark())

    def _since_origin(self, event: torch.cuda.Event) -> Instant:
        def at() -> float:
            event.synchronize()
            return self._origin.elapsed_time(event) / 1e3

        return at


class Recorder(Protocol):
    """What the executor tells of a pass."""

    def chunk(self, *halves: Action) -> AbstractContextManager[None]: ...
    def compute(self, name: str, action: Action) -> AbstractContextManager[None]: ...
    def transfer(self, name: str, action: Action, pending: Pending) -> None: ...


class Untraced:
    """Records nothing, at next to no cost."""

    def __init__(self) -> None:
        self._nothing = nullcontext()

    def chunk(self, *halves: Action) -> AbstractContextManager[None]:
        return self._nothing

    def compute(self, name: str, action: Action) -> AbstractContextManager[None]:
        return self._nothing

    def transfer(self, name: str, action: Action, pending: Pending) -> None:
        pass


class Reporting:
    """Says where the rank is, and passes on what it is told to ``inner``. Transfers say it themselves."""

    def __init__(self, where: Whereabouts, inner: Recorder) -> None:
        self._where, self._inner = where, inner

    def chunk(self, *halves: Action) -> AbstractContextManager[None]:
        self._where.at(" with ".join(map(str, halves)))
        return self._inner.chunk(*halves)

    def compute(self, name: str, action: Action) -> AbstractContextManager[None]:
        self._where.at(f"{action} {name}")
        return self._inner.compute(name, action)

    def transfer(self, name: str, action: Action, pending: Pending) -> None:
        self._inner.transfer(name, action, pending)


class Trace:
    """Collects what one rank did in one step: chunks, and inside them phases on two lanes. Messages between stages are
    not in it: gloo does not tell when one has passed."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self._clock: Clock = DeviceClock(device) if device.type == "cuda" else HostClock()
        self._chunks: list[tuple[Action, bool, Instant, Instant]] = []
        self._phases: list[tuple[Lane, str, Action, Instant, Instant]] = []

    @contextmanager
    def chunk(self, *halves: Action) -> Iterator[None]:
        """The time of one step, from its first phase on: waiting for what it needs is not work. The halves of a pair
        share it."""
        before = len(self._phases)
        yield
        end = self._clock.now()
        start = self._phases[before][3] if len(self._phases) > before else end
        self._chunks += [(action, len(halves) == 2, start, end) for action in halves]

    @contextmanager
    def compute(self, name: str, action: Action) -> Iterator[None]:
        start = self._clock.now()
        yield
        self._phases.append((Lane.COMPUTE, name, action, start, self._clock.now()))

    def transfer(self, name: str, action: Action, pending: Pending) -> None:
        """A transfer that has just been started."""
        start, end = self._clock.now(), self._clock.end_of(pending)
        self._phases.append((Lane.COMMUNICATION, name, action, start, end))

    @property
    def spans(self) -> list[Span]:
        """Chunks in the order they ran. The step is over."""
        return [
            Span(self.rank, a.kind, a.stage, a.microbatch, start(), end(), paired)
            for a, paired, start, end in self._chunks
        ]

    @property
    def phases(self) -> list[PhaseSpan]:
        """Phases in the order they were issued. The step is over."""
        return [
            PhaseSpan(self.rank, lane, name, a.kind, a.stage, a.microbatch, start(), end())
            for lane, name, a, start, end in self._phases
        ]
