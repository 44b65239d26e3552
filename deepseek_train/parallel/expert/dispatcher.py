"""How tokens get to their experts and back, behind one small interface.

``announce`` -> its route -> ``plan`` -> ``plan.there`` -> experts -> ``plan.home``. What is a route can be started and
waited for (``phases.parcel``), so the executor runs it beside computations, and its ``back()`` is that of gradients.
``dispatch`` and ``combine`` do the same in one piece, under autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deepseek_train.parallel.expert.alone import plan_alone
from deepseek_train.parallel.expert.announce import Announcing, TokenRouting, Told, message
from deepseek_train.parallel.expert.flat import plan_flat
from deepseek_train.parallel.expert.group import ALONE, ExpertGroup
from deepseek_train.parallel.expert.journey import UNCHANGED, WireFormats
from deepseek_train.parallel.expert.local import Dispatched
from deepseek_train.parallel.expert.plan import DispatchPlan
from deepseek_train.parallel.expert.two_hop import plan_two_hop
from deepseek_train.phases.moved import moved
from deepseek_train.phases.parcel import Route, Stay


class Dispatcher(Protocol):
    """For layers whose experts are spread over one group of ranks."""

    @property
    def group(self) -> ExpertGroup: ...

    def announce(
        self, routing: TokenRouting, num_experts: int, layer: int, capacity: int | None = None
    ) -> tuple[Tensor, Route]:
        """What this rank tells the others about ``layer``, and the route of that. ``capacity``: the most tokens that a
        rank of the group has; None: all have as many as this one."""

    def plan(self, told: Tensor, routing: TokenRouting, num_experts: int) -> DispatchPlan:
        """The plan, given what the route has brought. Waits for the device once. Raises RoutingFault on every rank of
        the group when the router of one has decided what cannot be followed."""


PlanMaker = Callable[[Told, int, int, ExpertGroup, WireFormats], DispatchPlan]


@dataclass(frozen=True)
class Planned:
    """A dispatcher that is its way of planning: hops over torch.distributed."""

    make: PlanMaker
    group: ExpertGroup
    formats: WireFormats = UNCHANGED

    def announce(
        self, routing: TokenRouting, num_experts: int, layer: int, capacity: int | None = None
    ) -> tuple[Tensor, Route]:
        most = len(routing.expert_ids_NK) if capacity is None else capacity
        told = message(routing, num_experts, layer, most)
        return told, (Stay() if self.group.size == 1 else Announcing(self.group))

    def plan(self, told: Tensor, routing: TokenRouting, num_experts: int) -> DispatchPlan:
        num_tokens, top_k = routing.expert_ids_NK.shape
        messages = Told.of(told.view(self.group.size, -1), top_k)
        return self.make(messages, num_tokens, num_experts, self.group, self.formats)


def flat(group: ExpertGroup, formats: WireFormats = UNCHANGED) -> Planned:
    """One all-to-all; on one rank, none."""
    return Planned(plan_flat if group.size > 1 else plan_alone, group, formats)


def two_hop(group: ExpertGroup, formats: WireFormats = UNCHANGED) -> Planned:
    """One hop between nodes, one inside."""
    return Planned(plan_two_hop, group, formats)


LOCAL = flat(ALONE)  # all experts on one rank


def dispatch(x_ND: Tensor, weights_NK: Tensor, plan: DispatchPlan) -> Dispatched:
    """Tokens at the ranks of their experts (collective, and so is its backward)."""
    x_RD, weights_RK = moved(plan.there, (x_ND, weights_NK))
    return Dispatched(x_RD, weights_RK, plan.arrivals)


def combine(y_RD: Tensor, plan: DispatchPlan) -> Tensor:
    """The sum of what came of each token on all ranks: y_ND (collective, and so is its backward)."""
    (y_ND,) = moved(plan.home, (y_RD,))
    return y_ND
