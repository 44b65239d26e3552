"""What every contestant runs: a tiny real model whose chunks take set times, and which knows its true gradients.

Stage s is y = x W_s^T, [rows, width], in float64. A chunk sleeps once when it runs forward (F), once for its input
gradient (I), once for its weight gradient (W); the rest of what it does takes microseconds.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_train.schedule.action import Kind, Schedule
from deepseek_train.schedule.simulate import Durations

ROWS, WIDTH = 4, 8
DTYPE = torch.float64


@dataclass(frozen=True)
class Contestant:
    """One implementation of a schedule on this rank, ready to run any number of steps."""

    step: Callable[[], None]
    gradients: Callable[
        [], dict[int, Tensor]
    ]  # stage -> dW [width, width], summed over steps and copies here
    schedule: Schedule  # what it carries out, for the ideal


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds each kind of work sleeps."""

    forward: float
    backward_input: float
    backward_weight: float

    def durations(self) -> Durations:
        """For the simulator; an overlapped pair takes as long as its halves: there is nothing to hide here."""
        f, i, w = self.forward, self.backward_input, self.backward_weight
        return Durations(f, i, w, overlapped=f + i + w)


class Sleeper:
    """Sleeps and keeps count. ``times`` None: counts only."""

    def __init__(self) -> None:
        self.times: ChunkTimes | None = None
        self.slept = 0.0  # seconds, by the clock
        self.counts: Counter[Kind] = Counter()

    def sleep(self, kind: Kind) -> None:
        self.counts[kind] += 1
        if self.times is None:
            return
        start = time.perf_counter()
        match kind:
            case Kind.FORWARD:
                time.sleep(self.times.forward)
            case Kind.BACKWARD_INPUT:
                time.sleep(self.times.backward_input)
            case Kind.BACKWARD_WEIGHT:
                time.sleep(self.times.backward_weight)
            case Kind.BACKWARD:
                raise ValueError("a full backward sleeps twice: for I and for W")
        self.slept += time.perf_counter() - start


def initial_weight(stage: int) -> Tensor:
    """W_s [width, width], the same for everybody."""
    generator = torch.Generator().manual_seed(stage)
    return torch.randn(WIDTH, WIDTH, dtype=DTYPE, generator=generator) * (1 / math.sqrt(WIDTH))


def inputs_of_step(num_microbatches: int) -> Tensor:
    """Whole numbers [micro-batches, rows, width], int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-3, 4, (num_microbatches, ROWS, WIDTH), generator=generator)


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


def true_gradients(num_stages: int, num_microbatches: int) -> list[Tensor]:
    """dW [width, width] of each stage after one step, by plain autograd; loss: mean over micro-batches."""
    weights = [initial_weight(stage).requires_grad_() for stage in range(num_stages)]
    y = inputs_of_step(num_microbatches).to(DTYPE)
    for weight in weights:
        y = y @ weight.t()
    return list(torch.autograd.grad(loss_of(y), weights))
