"""Peak memory of this process."""

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes() -> int:
    """What ``StepMetrics.memory_bytes`` reports for this rank: device memory on GPUs, else resident set."""
    device = peak_device_bytes()
    return peak_resident_bytes() if device is None else device


def peak_device_bytes() -> int | None:
    """Most bytes the allocator of the current CUDA device had reserved at once; None without CUDA."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def peak_resident_bytes() -> int:
    """Largest resident set so far. Linux says it in /proc; getrusage is for the others: after a fork its
    figure starts from the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
