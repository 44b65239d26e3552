"""Where metrics go: a sink takes facts about steps, a monitor hands each fact to all of its sinks."""

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from deepseek_train.monitor.metrics import EvalMetrics, StepMetrics


class Sink(Protocol):
    """One destination. Only rank 0 owns sinks, so none of them may wait for another rank."""

    def step(self, metrics: StepMetrics) -> None:
        """Takes every step, in order; a sink that shows only some steps picks them itself."""

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Takes every validation, after the step it followed."""

    def rewind(self, step: int) -> None:
        """The run was rolled back: what comes next is the step after ``step`` once more."""

    def close(self) -> None:
        """Nothing comes after. Called once, also after an exception or Ctrl-C."""


@dataclass(frozen=True)
class Monitor:
    """A sink made of sinks; as a context manager it closes them, the last one first, whatever happened."""

    sinks: tuple[Sink, ...]

    def step(self, metrics: StepMetrics) -> None:
        for sink in self.sinks:
            sink.step(metrics)

    def evaluation(self, metrics: EvalMetrics) -> None:
        for sink in self.sinks:
            sink.evaluation(metrics)

    def rewind(self, step: int) -> None:
        for sink in self.sinks:
            sink.rewind(step)

    def close(self) -> None:
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
