"""What the NVIDIA driver says about this process's GPU, when there is a driver to ask."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

try:
    import pynvml
except ImportError:  # the extra "nvml" is not installed
    pynvml = None


@dataclass(frozen=True)
class GpuSample:
    """One reading of one device."""

    utilisation: float  # share of the last sampling interval in which some kernel ran, 0 .. 1
    memory_bytes: int  # used by all processes on the device
    power_watts: float
    temperature_celsius: int


class GpuProbe:
    """Reads the current CUDA device. Where it cannot, ``sample`` is None and why is said once, on stderr."""

    def __init__(self) -> None:
        self._handle: Any = None
        if not torch.cuda.is_available():
            return  # nobody expects GPU figures of a CPU run
        if pynvml is None:
            _say("nvidia-ml-py is not installed (pip install 'deepseek-train[nvml]')")
            return
        try:
            pynvml.nvmlInit()
            # by UUID: NVML counts all devices of the machine, torch only CUDA_VISIBLE_DEVICES
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            _say(str(error))

    def sample(self) -> GpuSample | None:
        """About a millisecond."""
        if self._handle is None:
            return None
        try:
            return GpuSample(
                utilisation=pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100,
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used),
                power_watts=pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
                temperature_celsius=int(
                    pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU)
                ),
            )
        except pynvml.NVMLError as error:
            self._handle = None
            _say(str(error))
            return None


def _say(reason: str) -> None:
    print(f"GPU utilisation, power and temperature are not shown: {reason}", file=sys.stderr)
