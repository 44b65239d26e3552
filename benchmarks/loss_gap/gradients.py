"""How far one step's gradients are off, at the same weights on the same batch: what a recipe does before a run has
averaged it away.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.loss_gap.cases import ABLATIONS, BF16, FP8, Case, Size, precision
from benchmarks.loss_gap.training import Trainee

_PRECISIONS = {"bf16": BF16, "exact sums": precision("fp8"), "fp8": FP8, **ABLATIONS}


@dataclass(frozen=True)
class GradientError:
    """Over all of the model's weights together."""

    name: str
    error: float  # ||g - g_FP32|| / ||g_FP32||
    length: float  # <g, g_FP32> / ||g_FP32||^2: below 1 where gradients are systematically too short


def gradient_errors(size: Size, data: str, warm: int, steps: int) -> tuple[GradientError, ...]:
    """Of each precision, in the state of a BF16 run of ``steps`` steps after ``warm`` of them. "exact sums": FP8
    with tiles summed up in FP32 from the first product on, which no tensor core of Hopper does."""
    torch.set_num_threads(1)
    trained = Trainee(Case("bf16", BF16, steps), size, data)
    for number in range(warm):
        trained.step(number)

    def gradients(name: str) -> Tensor:
        how = precision("fp32") if name == "fp32" else _PRECISIONS[name]
        other = Trainee(Case(name, how, steps), size, data)
        other.take_weights(trained)
        return other.gradients(warm).double()

    exact, found = gradients("fp32"), []
    square = exact.dot(exact)
    for name in _PRECISIONS:
        g = gradients(name)
        found.append(
            GradientError(name, float((g - exact).norm() / square.sqrt()), float(g.dot(exact) / square))
        )
    return tuple(found)
