"""What this machine has for a run, found without starting CUDA: local ranks are forked, and GPUs may yet be hidden."""

import os
from pathlib import Path
from typing import Literal

from deepseek_train.spec.layout import ParallelLayout


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
