"""A phase that does nothing, until a chosen action comes to it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_train.model.stage import Stage
from deepseek_train.phases.phase import Phase
from deepseek_train.phases.values import Hidden
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.schedule.action import Action, Kind, Schedule
from deepseek_train.schedule.dataflow import actions_of
from deepseek_train.schedule.overlap import Role


class Tripwire:
    """Calls ``strike`` in the forward (F), the input gradient (I) or the weight gradient (W) of ``action``; an I or W
    may be half of a B. Micro-batches are told apart by the order in which they come to the stage on ``rank``."""

    def __init__(self, schedule: Schedule, rank: int, action: Action, strike: Callable[[], None]) -> None:
        self.strike, self.kind = strike, action.kind
        halves = {Kind.FORWARD: Kind.FORWARD}.get(action.kind, Kind.BACKWARD)
        self.left = _microbatches(schedule, rank, action.stage, halves).index(action.microbatch) + 1

    def stretch(self, stage: Stage, *, in_front: bool = False) -> None:
        """Across ``stage``, behind its last block; ``in_front`` of its first, where weight gradients come
        last, in a stage that does not embed."""
        queue = stage.context.queue
        phase = Phase("tripwire", Role.ATTEND, lambda hidden: self._phase(hidden, queue))
        stage.trunk = (phase, *stage.trunk) if in_front else (*stage.trunk, phase)

    def passed(self, kind: Kind) -> None:
        if kind is self.kind:
            self.left -= 1
            if self.left == 0:
                self.strike()

    def _phase(self, hidden: Hidden, queue: WeightGradQueue) -> Hidden:
        return hidden.moved_to(_Wired.apply(hidden.x_BTD, self, queue))  # type: ignore[no-untyped-call]


class _Wired(Function):
    """The identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Tripwire, queue: WeightGradQueue) -> Tensor:
        wire.passed(Kind.FORWARD)
        ctx.wire, ctx.queue = wire, queue
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.wire.passed(Kind.BACKWARD_INPUT)
        ctx.queue.add(lambda: ctx.wire.passed(Kind.BACKWARD_WEIGHT))
        return dy, None, None


def _microbatches(schedule: Schedule, rank: int, stage: int, kind: Kind) -> list[int]:
    """In the order in which they run forward (F) or backward (B) through ``stage`` on ``rank``; weight gradients run in
    the order of their backwards."""
    kinds = (Kind.FORWARD,) if kind is Kind.FORWARD else (Kind.BACKWARD, Kind.BACKWARD_INPUT)
    actions = [action for step in schedule.steps_R[rank] for action in actions_of(step)]
    return [a.microbatch for a in actions if a.stage == stage and a.kind in kinds]
