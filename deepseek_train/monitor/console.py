"""The lines a person watches: one aligned line per logged step, validations, and skipped steps loudly."""

import math
import sys
from collections.abc import Callable
from typing import TextIO

from deepseek_train.monitor import numbers
from deepseek_train.monitor.metrics import EvalMetrics, StepMetrics
from deepseek_train.monitor.nvml import GpuSample
from deepseek_train.monitor.progress import Pace, open_display

_HEADER_EVERY = 20  # lines


class ConsoleSink:
    """Prints every ``log_every``-th step, the first and the last one it sees, and every skipped one.

    On a terminal, and if ``progress_bar``, the lines scroll above a bar that moves with every step. ``gpu``
    is asked once per printed line. A ``stream`` (default: stdout) that is closed underneath only silences
    the sink.
    """

    def __init__(
        self,
        total_steps: int,
        total_tokens: int,
        log_every: int = 10,
        progress_bar: bool = True,
        stream: TextIO | None = None,
        gpu: Callable[[], GpuSample | None] | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._log_every = log_every
        self._gpu = gpu
        self._display = open_display(stream or sys.stdout, total_tokens, progress_bar)
        self._pace = Pace(total_tokens)
        self._lines = 0

    def step(self, metrics: StepMetrics) -> None:
        left = self._pace.update(metrics.tokens, metrics.tokens_per_second)
        due = metrics.step % self._log_every == 0 or metrics.step >= self._total_steps or self._lines == 0
        if due or metrics.skipped:
            self._row(metrics, left)
        beside = (
            f"step {metrics.step}/{self._total_steps}  loss {metrics.loss:.4f}  "
            f"{numbers.count(metrics.tokens_per_second)} tok/s  {numbers.duration(left)} left"
        )
        self._display.progress(metrics.tokens, beside)

    def evaluation(self, metrics: EvalMetrics) -> None:
        text = f"validation after step {metrics.step}: loss {metrics.loss:.4f}"
        if metrics.loss < 50:
            text += f" (perplexity {math.exp(metrics.loss):.4g})"
        if metrics.mtp_loss is not None:
            text += f", MTP loss {metrics.mtp_loss:.4f}"
        if metrics.ema_loss is not None:
            text += f", averaged weights {metrics.ema_loss:.4f}"
        self._display.line(f"{text}, over {numbers.count(metrics.num_tokens)} tokens", style="bold cyan")

    def rewind(self, step: int) -> None:
        self._display.line(f"back to step {step}", style="bold red")

    def close(self) -> None:
        self._display.close()

    def _row(self, metrics: StepMetrics, seconds_left: float) -> None:
        gpu = self._gpu() if self._gpu else None
        cells = _cells(metrics, self._total_steps, seconds_left, gpu)
        if self._lines % _HEADER_EVERY == 0:
            self._display.line("  ".join(name.rjust(width) for name, width, _ in cells), style="bold")
        self._lines += 1
        self._display.line("  ".join(value.rjust(width) for _, width, value in cells))
        if metrics.skipped:
            why = metrics.skipped_why or "a gradient was not finite"
            warning = f"!!! STEP {metrics.step} SKIPPED: {why}; no weight moved !!!"
            self._display.line(warning, style="bold red")


def _cells(
    metrics: StepMetrics, total_steps: int, seconds_left: float, gpu: GpuSample | None
) -> list[tuple[str, int, str]]:
    """(heading, width, value) from left to right."""
    width = len(str(total_steps))
    cells = [
        ("step", 2 * width + 1, f"{metrics.step}/{total_steps}"),
        ("tokens", 6, numbers.count(metrics.tokens)),
        ("loss", 7, f"{metrics.loss:.4f}"),
    ]
    if metrics.mtp_loss is not None:
        cells.append(("mtp", 7, f"{metrics.mtp_loss:.4f}"))
    cells += [
        ("gradnorm", 8, f"{metrics.grad_norm:.3f}"),
        ("lr", 8, f"{metrics.lr:.2e}"),
        ("tok/s", 6, numbers.count(metrics.tokens_per_second)),
    ]
    if metrics.tflops is not None:
        cells.append(("TFLOP/s", 7, f"{metrics.tflops:.3g}"))  # of one rank
    if metrics.mfu is not None:
        cells.append(("MFU", 5, numbers.percent(metrics.mfu)))
    if metrics.expert_load:  # of the worst layer / of the mean layer
        violation = f"{metrics.worst_max_violation():.2f}/{metrics.mean_max_violation():.2f}"
        cells.append(("maxvio", 9, violation))
    cells.append(("memory", 8, numbers.data_size(metrics.memory_bytes)))
    cells.append(("skipped", 7, str(metrics.skipped_steps)))
    if gpu is not None:
        cells.append(("gpu", 4, f"{gpu.utilisation:.0%}"))
        cells.append(("power", 5, f"{gpu.power_watts:.0f}W"))
        cells.append(("temp", 5, f"{gpu.temperature_celsius}°C"))
    cells.append(("left", 6, numbers.duration(seconds_left)))
    return cells
