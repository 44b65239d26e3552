"""What flows between the phases of a block with experts.

Legend: B sequences, T positions, D hidden, R received rows.
"""

from dataclasses import dataclass

from torch import Tensor

from deepseek_train.parallel.expert.flat import Dispatched
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
    """After dispatch: tokens are where their experts are."""

    hidden: Hidden
    normed_BTD: Tensor
    dispatched: Dispatched


@dataclass(frozen=True)
class Computed:
    """After the experts: the shared expert is already in the residual stream, routed results are still away."""

    hidden: Hidden
    y_RD: Tensor
    plan: DispatchPlan
