"""How far one step's gradients are off, at the same weights on the same batch: what a recipe does before a run has
averaged it away.
"""

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.loss_gap.cases import ABLATIONS, BF16, FP8, Case, Size, precision
from benchmarks.loss_gap.training import Trainee
from deepseek_train.config.schema import PrecisionConfig

_PRECISIONS = {"bf16": BF16, "exact sums": precision("fp8"), "fp8": FP8, **ABLATIONS}


_BATCHES = 16


@dataclass(frozen=True)
class GradientError:
    """Over all of the model's weights together, medians over batches."""

    name: str
    error: float  # ||g - g_FP32|| / ||g_FP32||
    worst: float  # of any batch: one batch with a sharp attention can be far off (docs/log.md)
    length: float  # ||g|| / ||g_FP32||


def gradient_errors(size: Size, data: str, warm: int, steps: int) -> tuple[GradientError, ...]:
    """Of each precision, in the state of a BF16 run of ``steps`` steps after ``warm`` of them. "exact sums": FP8
    with tiles summed up in FP32 from the first product on, which no tensor core of Hopper does."""
    torch.set_num_threads(1)
    trained = Trainee(Case("bf16", BF16, steps), size, data)
    for number in range(warm):
        trained.step(number)

    def gradients(how: PrecisionConfig) -> list[Tensor]:
        other = Trainee(Case("", how, steps), size, data)
        other.take_weights(trained)
        return [other.gradients(warm + number) for number in range(_BATCHES)]

    exact, found = gradients(precision("fp32")), []
    for name, how in _PRECISIONS.items():
        pairs = list(zip(gradients(how), exact, strict=True))
        errors, lengths = (
            [float(one.norm() / true.norm()) for one, true in what]
            for what in ([(g - true, true) for g, true in pairs], pairs)
        )
        found.append(GradientError(name, statistics.median(errors), max(errors), statistics.median(lengths)))
    return tuple(found)
