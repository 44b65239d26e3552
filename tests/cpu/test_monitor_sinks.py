from dataclasses import dataclass, field

import pytest

from deepseek_train.monitor.metrics import EvalMetrics, StepMetrics
from deepseek_train.monitor.sinks import Monitor
from tests.cpu.monitor_samples import STEP

EVAL = EvalMetrics(step=120, tokens=1_966_080, loss=3.3, mtp_loss=None, num_tokens=65_536)


@dataclass
class Recorder:
    name: str
    heard: list[str]
    fails: bool = False
    steps: list[StepMetrics] = field(default_factory=list)

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        self.heard.append(f"{self.name} step {metrics.step}")

    def evaluation(self, metrics: EvalMetrics) -> None:
        self.heard.append(f"{self.name} evaluation {metrics.step}")

    def rewind(self, step: int) -> None:
        self.heard.append(f"{self.name} back to {step}")

    def close(self) -> None:
        self.heard.append(f"{self.name} close")
        if self.fails:
            raise OSError("disk full")


def test_monitor_hands_every_fact_to_every_sink_and_closes_backwards() -> None:
    heard: list[str] = []
    with Monitor((Recorder("a", heard), Recorder("b", heard))) as monitor:
        monitor.step(STEP)
        monitor.evaluation(EVAL)
        monitor.rewind(100)
    assert heard == [
        "a step 120",
        "b step 120",
        "a evaluation 120",
        "b evaluation 120",
        "a back to 100",
        "b back to 100",
        "b close",
        "a close",
    ]


def test_all_sinks_are_closed_after_ctrl_c_and_when_one_cannot_close() -> None:
    heard: list[str] = []
    with (
        pytest.raises(OSError, match="disk full"),
        Monitor((Recorder("a", heard), Recorder("b", heard, True))),
    ):
        raise KeyboardInterrupt
    assert heard == ["b close", "a close"]
