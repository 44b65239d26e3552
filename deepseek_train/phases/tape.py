"""A tape of detached segments: the forward of a chunk, phase by phase, that can be run backward phase by phase.

Each phase runs on detached copies of its inputs, so its autograd graph is its own. The backward pass walks the
segments from last to first, whenever the schedule says; nothing hooks into autograd and no thread is involved.
Inputs and outputs are remembered by their place in the graph alone: what no function has saved for its backward is
not kept.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deepseek_train.phases.parcel import InTransit, Parcel, Pending, Route, arrived, depart
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


class Watch(Protocol):
    """Is told what a tape does while it does it."""

    def computing(self, phase: Phase) -> AbstractContextManager[None]:
        """Around a computation, forward or backward."""

    def started(self, move: Move, pending: Pending) -> None:
        """A transfer has just been started."""


class Unwatched:
    """Nobody looks."""

    def computing(self, phase: Phase) -> AbstractContextManager[None]:
        return nullcontext()

    def started(self, move: Move, pending: Pending) -> None:
        pass


_UNWATCHED = Unwatched()


@dataclass(frozen=True)
class _Computed:
    inputs: Gradients  # where they arrive
    outputs: list[GradientEdge]

    def backward(self, gradients: Gradients) -> Gradients:
        pairs = [(o, g) for o, g in zip(self.outputs, gradients, strict=True) if g is not None]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return self.inputs


def _computed(phase: Phase, value: Any) -> "tuple[_Segment, Any]":
    if not phase.recompute:
        return _record(phase, value)
    with torch.enable_grad():  # tells which results are differentiable
        result = _detached(phase.run(value))
    return _Rerun(phase, value), result


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


_Segment = _Computed | _Rerun


@dataclass(frozen=True)
class _Moved:
    """A transfer: remembers the way back, not the tensors, and what was computed beside it. ``num_stays``:
    differentiable tensors that did not travel, after that."""

    move: Move
    route: Route
    num_moved: int
    num_stays: int
    beside: _Segment | None

    def backward(self, gradients: Gradients, watch: Watch) -> Gradients | _Returning:
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
        return _Returning(stayed, pending) if pending else stayed


class Tape:
    """Records phases in forward order, gives their gradients in reverse. For one micro-batch in one stage."""

    def __init__(self) -> None:
        self._segments: list[tuple[Phase, _Segment] | _Moved] = []
        self._gradients: Gradients | _Returning | None = None

    def run(self, phase: Phase | Move, value: Any, watch: Watch = _UNWATCHED) -> Any:
        """Runs ``phase`` on ``value``, once that has arrived, and records it. A communication is only started: its
        result is ``InTransit``, which the next ``run`` (or ``parcel.arrived``) waits for."""
        value = arrived(value)
        match phase:
            case Move():
                return self._move(phase, value, watch)
            case Phase():
                with watch.computing(phase):
                    segment, result = _computed(phase, value)
                self._segments.append((phase, segment))
                return result
            case _:
                assert_never(phase)

    def _move(self, move: Move, parcel: Parcel, watch: Watch) -> InTransit:
        transit, beside = depart(parcel, recorded=True), None
        watch.started(move, transit.pending)
        if move.beside:
            with watch.computing(move.beside):
                beside, stays = _computed(move.beside, parcel.stays)
            transit = replace(transit, parcel=replace(parcel, stays=stays))
        num_stays = len(differentiable(transit.parcel.stays))
        self._segments.append(_Moved(move, parcel.route, sum(transit.carries), num_stays, beside))
        return transit

    def __len__(self) -> int:
        """Segments that have not run backward yet."""
        return len(self._segments)

    def seed(self, gradients: Gradients) -> None:
        """Gradients of the last phase's differentiable outputs, in tree order. None: nothing flows from there."""
        self._gradients = gradients

    def backward(self, watch: Watch = _UNWATCHED) -> None:
        """Runs the last remaining segment backward, once its gradients have arrived. A communication is only started.
        Weight gradients go wherever the segment's functions put them."""
        gradients = self.gradients()
        match self._segments.pop():
            case _Moved() as moved:
                self._gradients = moved.backward(gradients, watch)
            case phase, segment:
                with watch.computing(phase):
                    self._gradients = segment.backward(gradients)

    def gradients(self) -> Gradients:
        """Gradients of the inputs of the segment last run backward: of what flowed into the chunk, in the end."""
        match self._gradients:
            case None:
                raise RuntimeError("a tape runs backward only after seed()")
            case _Returning():
                return self._gradients.arrived()
            case _:
                return self._gradients
