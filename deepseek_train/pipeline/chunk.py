"""One micro-batch on its way through one stage, a phase at a time: what the executor orders in time."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from deepseek_train.phases.parcel import InTransit, Pending, arrived
from deepseek_train.phases.phase import Move, Phase, Row
from deepseek_train.phases.segment import Gradients
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.values import Hidden, MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue, Work, run_works
from deepseek_train.pipeline.trace import Recorder
from deepseek_train.schedule.action import Action, Kind


@dataclass(frozen=True)
class Watched:
    """Tells a trace what a tape does for ``action``."""

    trace: Recorder
    action: Action

    def computing(self, phase: Phase) -> AbstractContextManager[None]:
        return self.trace.compute(phase.name, self.action)

    def started(self, move: Move, pending: Pending) -> None:
        self.trace.transfer(move.name, self.action, pending)


class ForwardChunk:
    """The forward of ``row``: ``enter`` gives its value when the first phase runs, ``leave`` takes the result right
    after the last."""

    def __init__(
        self,
        action: Action,
        row: Row,
        enter: Callable[[], MicroBatch | Hidden],
        leave: Callable[[Hidden], None],
        tape: Tape,
        trace: Recorder,
    ) -> None:
        self._row, self._enter, self._leave = row, enter, leave
        self._tape, self._watch = tape, Watched(trace, action)
        self._next = 0
        self._value: Any = None

    @property
    def done(self) -> bool:
        return self._next == len(self._row)

    def step(self) -> None:
        """Runs the next phase; starts it, if it is a communication."""
        if self._next == 0:
            self._value = self._enter()
        self._value = arrived(self._value)  # waits outside the phase's time
        phase = self._row[self._next]
        self._next += 1
        self._value = self._tape.run(phase, self._value, self._watch)
        if self.done:
            self._leave(arrived(self._value))

    def closes(self) -> bool:
        """Whether all that is left is to lay down what has already come back from other ranks."""
        left = self._row[self._next :]
        return (
            len(left) == 1
            and not left[0].part.moves
            and isinstance(self._value, InTransit)
            and self._value.pending.ready()
        )


class BackwardChunk:
    """The backward of what ``tape`` recorded over ``row``: ``enter`` gives the gradients of the results, ``leave``
    takes those of the inputs as soon as they are there, before any weight gradient that waits."""

    def __init__(
        self,
        action: Action,
        row: Row,
        enter: Callable[[], Gradients],
        leave: Callable[[Gradients], None],
        tape: Tape,
        queue: WeightGradQueue,
        trace: Recorder,
    ) -> None:
        self._row, self._enter, self._leave = row, enter, leave
        self._tape, self._queue, self._trace = tape, queue, trace
        self._watch = Watched(trace, Action(action.stage, Kind.BACKWARD_INPUT, action.microbatch))
        self._weights = Action(action.stage, Kind.BACKWARD_WEIGHT, action.microbatch)
        self._works: dict[int, list[Work]] = {}

    @property
    def done(self) -> bool:
        """Whether all input gradients are."""
        return len(self._tape) == 0

    def step(self) -> int:
        """Input gradients of the last phase that is left; returns its index. Its weight gradients wait."""
        if len(self._tape) == len(self._row):
            self._tape.seed(self._enter())
        self._tape.gradients()  # waits outside the phase's time
        index = len(self._tape) - 1
        self._tape.backward(self._watch)
        self._works[index] = self._queue.take_open()
        if self.done:
            self._leave(self._tape.gradients())
        return index

    def weights(self, index: int) -> None:
        """Weight gradients of phase ``index``."""
        works = self._works.pop(index)
        if not works:
            return
        phase = self._row[index]
        name = phase.beside.name if isinstance(phase, Move) and phase.beside else phase.name
        with self._trace.compute(name, self._weights):
            run_works(works)

    def keep_weights(self) -> None:
        """Leaves all weight gradients to the queue, as one group."""
        self._queue.seal([work for works in self._works.values() for work in works])
        self._works.clear()
