"""What the optimizers share: groups of weights, fragments of their state, the outcome of a step."""

import math
from collections.abc import Callable
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


# Told the gradient norm (inf where a gradient is not finite), says why the step must not be taken; None: it may.
Objection = Callable[[float], str | None]


@dataclass(frozen=True)
class StepOutcome:
    grad_norm: float  # over all weights of the job, before clipping; inf where a gradient was not finite
    refused: str | None = None  # why no rank moved a weight

    @property
    def skipped(self) -> bool:
        return self.refused is not None


def no_objection(_norm: float) -> str | None:
    return None


def refusal(norm: float, objection: Objection) -> str | None:
    """What ``objection`` says; a norm that is not finite is refused whatever it says."""
    return objection(norm) or (None if math.isfinite(norm) else "a gradient is not finite")


class DistributedOptimizer(Protocol):
    """Gradients arrive in ``weight.main_grad``, in any order; then ``reduce`` and ``step``, on every rank."""

    def reduce(self) -> None:
        """Sums gradients over each group's replicas."""

    def step(self, lr: float, objection: Objection = no_objection) -> StepOutcome:
        """Clips, updates, writes the weights back and clears ``main_grad``. Refused, it clears ``main_grad`` alone:
        weights, state and the count of steps stay as they are. ``objection`` must say the same on every rank."""
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
