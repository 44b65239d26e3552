"""Which kernels a run computes with, decided before it starts."""

from dataclasses import asdict

from deepseek_kernels.choice import AUTO, FAMILIES, Kernels, available, choose, problem
from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig


def plan_kernels(config: RunConfig, device_type: str) -> Kernels:
    """What ``kernels`` comes to. Check ``kernel_problems`` first."""
    asked = asdict(config.kernels)
    if device_type == "cuda" and asked["attention"] == AUTO and _beyond_cudnn(config):
        asked["attention"] = "triton"
    return choose(device_type, asked)


def kernel_problems(config: RunConfig, device_type: str) -> list[Problem]:
    """Why kernels asked for cannot be, on the device that the run will use."""
    asked = asdict(config.kernels)
    found = []
    for family in FAMILIES:
        reason = problem(device_type, family, asked[family])
        if reason is None and (device_type, family, asked[family]) == ("cuda", "attention", "torch"):
            reason = _beyond_cudnn(config)
        if reason is not None:
            there = ", ".join(["auto", *available(device_type, family)])
            found.append(Problem(f"kernels.{family}", reason, f"On this machine there are: {there}."))
    if found or config.precision.fp8 is None or config.precision.fp8.accumulate == "promoted":
        return found
    kernels = plan_kernels(config, device_type)
    others = sorted({kernels.gemm, kernels.grouped_gemm} - {"reference"})
    if not others:
        return []
    what = f"{config.precision.fp8.accumulate} is an emulation, which products by {' and '.join(others)} do not know"
    mend = "Write promoted, or kernels.gemm=reference and kernels.grouped_gemm=reference."
    return [Problem("precision.fp8.accumulate", what, mend)]


def _beyond_cudnn(config: RunConfig) -> str | None:
    """Why torch's attention on GPUs, which is cuDNN's, cannot do this model's; None: it can."""
    m = config.model
    sizes = m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim
    if config.precision.params != "bf16":
        return f"cuDNN's attention is for BF16, precision.params is {config.precision.params}"
    if any(size % 8 or size > 256 for size in sizes):
        return f"cuDNN's heads are multiples of 8 up to 256, these are {sizes[0]} and {sizes[1]}"
    return None
