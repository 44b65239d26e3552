"""Whose kernels compute: on a GPU those that a run gets by itself, on a CPU Triton's, interpreted, to rehearse."""

from deepseek_kernels.choice import FAMILIES, Kernels, choose
from deepseek_kernels.machine import interpreting


def chosen_kernels(device_type: str) -> Kernels:
    """Without Triton's interpreter, on a CPU: the reference."""
    if device_type == "cuda":
        return choose("cuda", {})
    if not interpreting():
        return Kernels()
    return choose("cpu", dict.fromkeys(set(FAMILIES) - {"wgrad"}, "triton"))
