"""Where the device's time goes, kernel by kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class KernelTime:
    name: str
    calls: int
    ms: float  # all calls together
    share: float  # of all kernels


def kernel_times(call: Callable[[], object], device: torch.device, most: int = 25) -> list[KernelTime]:
    """The kernels of one ``call`` that took longest, and "all". On a CPU: its operators, to rehearse."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as seen:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [e for e in seen.key_averages() if e.device_type == kind]
    times = [
        (e.key, e.count, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3)
        for e in events
    ]
    total = sum(ms for _, _, ms in times) or 1.0
    rows = [KernelTime(name, calls, ms, ms / total) for name, calls, ms in sorted(times, key=lambda t: -t[2])]
    return [KernelTime("all", sum(r.calls for r in rows), total, 1.0), *rows[:most]]


def kernel_table(rows: list[KernelTime]) -> str:
    lines = ["| kernel | calls | ms | share |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| `{r.name[:90]}` | {r.calls} | {r.ms:.3f} | {100 * r.share:.1f}% |" for r in rows]
    return "\n".join(lines)
