"""Products with weights in the precision of the run: of all linears but the router's and the head's, which FP8 leaves
alone (V3 report section 3.3.1).
"""

from torch import Tensor

from deepseek_train.fp8.linear import fp8_linear, fp8_linears
from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import linear
from deepseek_train.phases.wgrad import Weight


def project(x: Tensor, weight: Weight, context: ModelContext) -> Tensor:
    """x W^T."""
    if context.fp8 is not None:
        return fp8_linear(x, weight, context.fp8)
    return linear(x, weight, context.queue, context.kernels.wgrad)


def project_both(x: Tensor, first: Weight, second: Weight, context: ModelContext) -> tuple[Tensor, Tensor]:
    """x W^T of two weights; in FP8 their input is quantised, and waits, once."""
    if context.fp8 is not None:
        y, z = fp8_linears(x, (first, second), context.fp8)
        return y, z
    queue, wgrad = context.queue, context.kernels.wgrad
    return linear(x, first, queue, wgrad), linear(x, second, queue, wgrad)
