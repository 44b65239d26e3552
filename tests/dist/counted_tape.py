"""A tape that is counted, for tests of how many are kept."""

import weakref

from deepseek_train.phases.tape import Tape
from deepseek_train.phases.watch import UNWATCHED, Watch


class CountedTape(Tape):
    """Knows how many tapes are in flight: made, and not yet run backward to the end."""

    in_flight = peak = made = 0
    alive: "weakref.WeakSet[CountedTape]" = weakref.WeakSet()

    def __init__(self) -> None:
        super().__init__()
        CountedTape.made += 1
        CountedTape.in_flight += 1
        CountedTape.peak = max(CountedTape.peak, CountedTape.in_flight)
        CountedTape.alive.add(self)

    def backward(self, watch: Watch = UNWATCHED) -> None:
        super().backward(watch)
        CountedTape.in_flight -= not len(self)

    @classmethod
    def forget(cls) -> None:
        cls.in_flight = cls.peak = cls.made = 0
