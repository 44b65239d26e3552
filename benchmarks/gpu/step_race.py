"""One entry's steps, timed."""

import gc
import time
import traceback
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.profile import KernelTime, kernel_times
from benchmarks.gpu.trainer import Entry, Task, Trainer
from deepseek_train.spec import work
from deepseek_train.spec.throughput import Throughput, known_peak


@dataclass(frozen=True)
class Limits:
    """Of one entry. Without time left at least one step warms up and one counts."""

    seconds: float
    warm_up: int = 3
    counted: int = 8


@dataclass(frozen=True)
class Result:
    entry: str
    kernels: str
    linears: str
    step_ms: float | None = None  # median; None: it could not run
    fastest_ms: float | None = None
    steps: int = 0
    tokens_per_second: float = 0.0
    tflops: float = 0.0  # causal count
    mfu: float | None = None  # of the BF16 peak
    peak_gib: float = 0.0  # allocated
    first_step_seconds: float = 0.0  # with compilation
    losses: tuple[float, ...] = ()
    note: str = ""
    profile: list[KernelTime] = field(default_factory=list)

    def line(self) -> str:
        if self.step_ms is None:
            return f"{self.entry}: {self.note}"
        return (
            f"{self.entry}: {self.step_ms:.1f} ms, {self.tokens_per_second:.0f} tokens/s, {self.tflops:.4g} TFLOP/s, "
            f"{self.peak_gib:.1f} GiB, loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}, "
            f"first step {self.first_step_seconds:.1f} s, {self.kernels}"
        )


def race(task: Task, entry: Entry, device: torch.device, limits: Limits, profiled: bool) -> Result:
    """Builds, trains and forgets one entry. One that cannot run is a result that says why."""
    linears = "BF16" if entry.fp8 is None else "FP8"
    _forget(device)
    try:
        return _timed(task, entry, device, limits, profiled, linears)
    except Exception as error:
        traceback.print_exc()
        return Result(entry.name, str(entry.kernels), linears, note=f"{type(error).__name__}: {error}"[:300])
    finally:
        _forget(device)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _timed(
    task: Task, entry: Entry, device: torch.device, limits: Limits, profiled: bool, linears: str
) -> Result:
    trainer = Trainer(task, entry, device)
    started = time.perf_counter()
    losses = [float(trainer.step())]
    first = time.perf_counter() - started
    deadline, times = time.perf_counter() + limits.seconds, []
    while len(losses) < limits.warm_up and time.perf_counter() < deadline:
        losses.append(float(trainer.step()))
    while not times or (len(times) < limits.counted and time.perf_counter() < deadline):
        ms, loss = _step_ms(trainer, device)
        times.append(ms)
        losses.append(loss)
    median = sorted(times)[len(times) // 2]
    speed = task.step_tokens / median * 1e3
    peak = known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    count = Throughput(work.training(task.model, task.sequence_length).total, peak)
    tflops = count.tflops(speed, 1)
    return Result(
        entry.name,
        str(entry.kernels),
        linears,
        step_ms=median,
        fastest_ms=min(times),
        steps=len(times),
        tokens_per_second=speed,
        tflops=tflops,
        mfu=count.mfu(tflops),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        first_step_seconds=first,
        losses=tuple(losses),
        profile=kernel_times(trainer.step, device) if profiled else [],
    )


def _step_ms(trainer: Trainer, device: torch.device) -> tuple[float, float]:
    if device.type != "cuda":
        started = time.perf_counter()
        loss = float(trainer.step())
        return (time.perf_counter() - started) * 1e3, loss
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    loss_on_device = trainer.step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last), float(loss_on_device)
