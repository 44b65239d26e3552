"""What a tape keeps of one phase: enough to run it backward, whenever the schedule says.

A phase runs on detached copies of its inputs, so its autograd graph is its own; nothing hooks into autograd. Inputs and
outputs are remembered by their place in the graph alone: what no function has saved for its backward is not kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deepseek_train.phases.parcel import Pending, Route
from deepseek_train.phases.phase import Move, Phase
from deepseek_train.phases.tree import differentiable, with_tensors
from deepseek_train.phases.watch import Watch

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Returning:
    """Gradients whose rear part is still on its way back between ranks."""

    stayed: Gradients
    pending: Pending

    def arrived(self) -> Gradients:
        return [*self.stayed, *self.pending.wait()]


class _Source(Function):
    """Tensors from outside as the beginning of a graph; ``home`` takes their gradients. (Leaves would do, but hold
    their data as long as the graph lives.) ``anchor`` stands for what requires the gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, home: Gradients, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.home = home
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.home[:] = gradients
        return (None,) * (2 + len(gradients))


@dataclass(frozen=True)
class Computed:
    inputs: Gradients  # where they arrive
    outputs: list[GradientEdge]

    def backward(self, gradients: Gradients) -> Gradients:
        pairs = [(o, g) for o, g in zip(self.outputs, gradients, strict=True) if g is not None]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return self.inputs


def computed(phase: Phase, value: Any) -> "tuple[Segment, Any]":
    if not phase.recompute:
        return _record(phase, value)
    with torch.enable_grad():  # tells which results are differentiable
        result = _detached(phase.run(value))
    return Rerun(phase, value), result


def _record(phase: Phase, value: Any) -> tuple[Computed, Any]:
    """Runs ``phase`` with a graph of its own: that, and the result."""
    outside = [t.detach() for t in differentiable(value)]
    home: Gradients = [None] * len(outside)
    with torch.enable_grad():
        if outside:
            anchor = torch.zeros((), requires_grad=True)
            value = with_tensors(value, iter(_Source.apply(anchor, home, *outside)))
        result = phase.run(value)
    return Computed(home, [get_gradient_edge(t) for t in differentiable(result)]), result


def _detached(value: Any) -> Any:
    return with_tensors(value, (t.detach().requires_grad_() for t in differentiable(value)))


@dataclass(frozen=True)
class Rerun:
    """A phase of which only the inputs were kept."""

    phase: Phase
    value: Any

    def backward(self, gradients: Gradients) -> Gradients:
        return _record(self.phase, self.value)[0].backward(gradients)


Segment = Computed | Rerun


@dataclass(frozen=True)
class Moved:
    """A transfer: remembers the way back, not the tensors, and what was computed beside it. ``num_stays``:
    differentiable tensors that did not travel, after that."""

    move: Move
    route: Route
    num_moved: int
    num_stays: int
    beside: Segment | None

    def backward(self, gradients: Gradients, watch: Watch) -> Gradients | Returning:
        moved = tuple(g for g in gradients[self.num_stays :] if g is not None)
        if len(moved) != self.num_moved:
            raise RuntimeError("a tensor that another rank sent got no gradient: its sender waits for one")
        pending = self.route.back().start(moved) if moved else None
        if pending:
            watch.started(self.move, pending)
        stayed = gradients[: self.num_stays]
        if self.beside and self.move.beside:
            with watch.computing(self.move.beside):
                stayed = self.beside.backward(stayed)
        return Returning(stayed, pending) if pending else stayed
