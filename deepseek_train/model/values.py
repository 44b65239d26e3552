"""What flows between the phases of a block with experts.

Legend: B sequences, T positions, D hidden, R received rows.
"""

from dataclasses import dataclass

from torch import Tensor

from deepseek_train.parallel.expert.plan import DispatchPlan, TokenRouting
from deepseek_train.phases.values import Hidden


@dataclass(frozen=True)
class Attended:
    """After attention and routing: the residual stream, the normalised FFN input, the router's decision."""

    hidden: Hidden
    normed_BTD: Tensor
    routing: TokenRouting


@dataclass(frozen=True)
class Sent:
    """What waits at home while tokens travel to their experts."""

    hidden: Hidden
    normed_BTD: Tensor
    plan: DispatchPlan


@dataclass(frozen=True)
class Computed:
    """What waits at home while results travel back: the shared expert's is already in the residual stream."""

    hidden: Hidden
    plan: DispatchPlan
