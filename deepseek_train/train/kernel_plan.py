"""Which kernels a run computes with, decided before it starts."""

from dataclasses import asdict

import torch

from deepseek_kernels.choice import FAMILIES, Kernels, available, choose, problem
from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig


def plan_kernels(config: RunConfig, device_type: str) -> Kernels:
    """What ``kernels`` comes to. Check ``kernel_problems`` first."""
    return choose(device_type, asdict(config.kernels))


def kernel_problems(config: RunConfig) -> list[Problem]:
    """Why kernels asked for cannot be, on the device that this machine would use."""
    device_type = "cuda" if config.cluster.device != "cpu" and torch.cuda.is_available() else "cpu"
    asked = asdict(config.kernels)
    found = []
    for family in FAMILIES:
        reason = problem(device_type, family, asked[family])
        if reason is not None:
            there = ", ".join(["auto", *available(device_type, family)])
            found.append(Problem(f"kernels.{family}", reason, f"There are: {there}."))
    if found or config.precision.fp8 is None or config.precision.fp8.accumulate == "promoted":
        return found
    kernels = plan_kernels(config, device_type)
    others = sorted({kernels.gemm, kernels.grouped_gemm} - {"reference"})
    if not others:
        return []
    what = f"{config.precision.fp8.accumulate} is an emulation, which products by {' and '.join(others)} do not know"
    mend = "Write promoted, or kernels.gemm=reference and kernels.grouped_gemm=reference."
    return [Problem("precision.fp8.accumulate", what, mend)]
