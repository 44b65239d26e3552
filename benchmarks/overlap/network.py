"""A network of set speed: real transfers that take at least as long as their bytes would on one serial link."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from deepseek_train.phases.parcel import Pending, Route, Tensors


class Wire:
    """The way out of one rank: what is sent later leaves after what was sent before."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def book(self, seconds: float) -> float:
        """The moment (of ``time.perf_counter``) at which a transfer of ``seconds`` that starts now is over."""
        self._free_at = max(time.perf_counter(), self._free_at) + seconds
        return self._free_at


@dataclass(frozen=True)
class Travelling:
    """A real transfer that is not over before ``moment``."""

    real: Pending
    moment: float

    def wait(self) -> Tensors:
        tensors = self.real.wait()
        time.sleep(max(0.0, self.moment - time.perf_counter()))
        return tensors

    def ready(self) -> bool:
        return time.perf_counter() >= self.moment and self.real.ready()

    def when_done(self, note: Callable[[], None]) -> None:
        def at_moment() -> None:
            timer = threading.Timer(max(0.0, self.moment - time.perf_counter()), note)
            timer.daemon = True
            timer.start()

        self.real.when_done(at_moment)


@dataclass(frozen=True)
class Shaped:
    """``real`` at ``seconds_per_byte``; the way back has a speed of its own (FP8 forth, BF16 back)."""

    real: Route
    wire: Wire
    seconds_per_byte: float
    seconds_per_byte_back: float

    def start(self, tensors: Tensors) -> Travelling:
        pending = self.real.start(tensors)
        num_bytes = sum(t.nbytes for t in tensors)
        return Travelling(pending, self.wire.book(num_bytes * self.seconds_per_byte))

    def back(self) -> "Shaped":
        return Shaped(self.real.back(), self.wire, self.seconds_per_byte_back, self.seconds_per_byte)
