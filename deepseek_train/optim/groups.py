"""What the optimizers share: groups of weights, fragments of their state, the outcome of a step."""

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from deepseek_train.phases.wgrad import Weight


@dataclass(frozen=True)
class WeightGroup:
    """Weights whose gradients are summed over the same replicas and that are decayed alike: one flat buffer.
    ``replicas`` is None where this rank holds the only copy."""

    weights: dict[str, Weight]
    replicas: dist.ProcessGroup | None
    weight_decay: float


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one weight's optimizer state: elements [start, start + len(master)) of the flattened local
    weight. Views: writing to them changes the state."""

    name: str
    start: int
    master: Tensor  # FP32
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class StepOutcome:
    grad_norm: float  # over all weights of the job, before clipping; inf when skipped
    skipped: bool  # a gradient somewhere was not finite: no rank moved a weight


class DistributedOptimizer(Protocol):
    """Gradients arrive in ``weight.main_grad``, in any order; then ``reduce`` and ``step``, on every rank."""

    def reduce(self) -> None:
        """Sums gradients over each group's replicas."""

    def step(self, lr: float) -> StepOutcome:
        """Clips, updates, writes the weights back and clears ``main_grad``."""
        ...

    def fragments(self) -> list[Fragment]:
        """The state this rank is responsible for; together the ranks of a replica group hold each element once."""
        ...

    def steps_taken(self) -> int: ...

    def restore(self, steps_taken: int) -> None:
        """After the fragments have been written to: sets the step count and publishes the master weights."""


def split_flat(
    names: list[str], sizes: list[int], start: int, length: int
) -> list[tuple[str, int, int, int]]:
    """Which pieces of the weights laid out one after another fall into [start, start + length): (name, offset
    within the weight, offset within the range, elements)."""
    pieces, at = [], 0
    for name, size in zip(names, sizes, strict=True):
        low, high = max(at, start), min(at + size, start + length)
        if low < high:
            pieces.append((name, low - at, low - start, high - low))
        at += size
    return pieces
