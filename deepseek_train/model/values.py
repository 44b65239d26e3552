"""What flows between the phases of a block with experts.

Legend: B sequences, T positions, D hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from deepseek_train.parallel.expert.announce import TokenRouting
from deepseek_train.parallel.expert.plan import DispatchPlan
from deepseek_train.phases.values import Hidden


@dataclass(frozen=True)
class Attended:
    """After attention and routing: the residual stream, the normalised FFN input, the router's decision."""

    hidden: Hidden
    normed_BTD: Tensor
    routing: TokenRouting


@dataclass(frozen=True)
class Sent:
    """What waits at home while tokens travel to their experts. ``normed_BTD`` until the shared expert has had it; then
    its result is in the residual stream."""

    hidden: Hidden
    normed_BTD: Tensor | None
    plan: DispatchPlan
