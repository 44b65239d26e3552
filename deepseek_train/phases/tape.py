"""A tape of detached segments: the forward of a chunk, phase by phase, that can be run backward phase by phase.

Each phase runs on detached copies of its inputs, so its autograd graph is its own. The backward pass walks the
segments from last to first, whenever the schedule says; nothing hooks into autograd and no thread is involved.
Inputs and outputs are remembered by their place in the graph alone: what no function has saved for its backward is
not kept.
"""

from dataclasses import dataclass
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deepseek_train.phases.parcel import Parcel, Pending, Route, arrived, depart
from deepseek_train.phases.phase import Move, Phase
from deepseek_train.phases.tree import differentiable, with_tensors

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class _Returning:
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


class _Segment(Protocol):
    def backward(self, gradients: Gradients) -> Gradients | _Returning: ...


class Tape:
    """Records phases in forward order, gives their gradients in reverse. For one micro-batch in one stage."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._gradients: Gradients | _Returning | None = None

    def run(self, phase: Phase | Move, value: Any) -> Any:
        """Runs ``phase`` on ``value``, once that has arrived, and records it. A communication is only started: its
        result is ``InTransit``, which the next ``run`` (or ``parcel.arrived``) waits for."""
        value = arrived(value)
        match phase:
            case Move():
                transit = depart(value, recorded=True)
                self._segments.append(_Moved(value, transit.carries))
                return transit
            case Phase():
                return self._compute(phase, value)
            case _:
                assert_never(phase)

    def _compute(self, phase: Phase, value: Any) -> Any:
        if phase.recompute:
            with torch.enable_grad():  # tells which results are differentiable
                result = _detached(phase.run(value))
            self._segments.append(_Rerun(phase, value))
        else:
            segment, result = _record(phase, value)
            self._segments.append(segment)
        return result

    def __len__(self) -> int:
        """Segments that have not run backward yet."""
        return len(self._segments)

    def seed(self, gradients: Gradients) -> None:
        """Gradients of the last phase's differentiable outputs, in tree order. None: nothing flows from there."""
        self._gradients = gradients

    def backward(self) -> Pending | None:
        """Runs the last remaining segment backward, once its gradients have arrived. A communication is only started
        and returned. Weight gradients go wherever the segment's functions put them."""
        gradients = self.gradients()
        self._gradients = self._segments.pop().backward(gradients)
        return self._gradients.pending if isinstance(self._gradients, _Returning) else None

    def gradients(self) -> Gradients:
        """Gradients of the inputs of the segment last run backward: of what flowed into the chunk, in the end."""
        match self._gradients:
            case None:
                raise RuntimeError("a tape runs backward only after seed()")
            case _Returning():
                return self._gradients.arrived()
            case _:
                return self._gradients


@dataclass(frozen=True)
class _Computed:
    inputs: Gradients  # where they arrive
    outputs: list[GradientEdge]

    def backward(self, gradients: Gradients) -> Gradients:
        pairs = [(o, g) for o, g in zip(self.outputs, gradients, strict=True) if g is not None]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return self.inputs


def _record(phase: Phase, value: Any) -> tuple[_Computed, Any]:
    """Runs ``phase`` with a graph of its own: that, and the result."""
    outside = [t.detach() for t in differentiable(value)]
    home: Gradients = [None] * len(outside)
    with torch.enable_grad():
        if outside:
            anchor = torch.zeros((), requires_grad=True)
            value = with_tensors(value, iter(_Source.apply(anchor, home, *outside)))
        result = phase.run(value)
    return _Computed(home, [get_gradient_edge(t) for t in differentiable(result)]), result


def _detached(value: Any) -> Any:
    return with_tensors(value, (t.detach().requires_grad_() for t in differentiable(value)))


@dataclass(frozen=True)
class _Rerun:
    """A phase of which only the inputs were kept."""

    phase: Phase
    value: Any

    def backward(self, gradients: Gradients) -> Gradients:
        return _record(self.phase, self.value)[0].backward(gradients)


class _Moved:
    """A transfer: remembers the way back, not the tensors."""

    def __init__(self, parcel: Parcel, carries: tuple[bool, ...]) -> None:
        self._route: Route = parcel.route
        self._num_moved, self._num_stays = sum(carries), len(differentiable(parcel.stays))

    def backward(self, gradients: Gradients) -> _Returning:
        moved = tuple(g for g in gradients[self._num_stays :] if g is not None)
        if len(moved) != self._num_moved:
            raise RuntimeError("a tensor that another rank sent got no gradient: its sender waits for one")
        return _Returning(gradients[: self._num_stays], self._route.back().start(moved))
