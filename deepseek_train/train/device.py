"""What this machine has for a run, found without starting CUDA: local ranks are forked, and GPUs may yet be hidden."""

import os
from pathlib import Path
from typing import Literal

from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.monitor import numbers
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.spec.weights import all_weights, count_parameters

_BYTES = {"fp32": 4, "bf16": 2}


def visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    return len(visible.split(",")) * bool(visible)


def local_ranks(layout: ParallelLayout) -> int:
    """On this machine: torchrun says, or all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", layout.world))


def planned_device(asked: Literal["auto", "cpu", "cuda"], layout: ParallelLayout) -> Literal["cpu", "cuda"]:
    """``auto``: GPUs where there is one for each rank of this machine."""
    if asked == "auto":
        return "cuda" if visible_gpus() >= local_ranks(layout) else "cpu"
    return asked


def memory_problems(config: RunConfig, layout: ParallelLayout) -> list[Problem]:
    """Where CPUs are to train what cannot be held: one copy of the weights, gradients and moments is more than this
    machine's memory. Its ranks would be killed without a word."""
    parameters = count_parameters(all_weights(config.model)) * local_ranks(layout) // layout.world
    masters_and_gradients = 4 + 4
    each = masters_and_gradients + _BYTES[config.precision.params] + 2 * _BYTES[config.precision.moments]
    needed, there = parameters * each, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed <= there:
        return []
    what = (
        f"{numbers.count(parameters)} parameters with gradients and moments take {numbers.data_size(needed)} at least, "
        f"this machine, on whose CPUs the run would be, has {numbers.data_size(there)}"
    )
    return [
        Problem("model", what, "Take a smaller one (experiment=tiny), or start on GPUs or on more machines.")
    ]
