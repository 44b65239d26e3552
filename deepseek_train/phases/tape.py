"""A tape of segments: the forward of a chunk, phase by phase, that can be run backward phase by phase, from last to
first. No thread is involved.
"""

from dataclasses import replace
from typing import Any, assert_never

from deepseek_train.phases.parcel import InTransit, Parcel, arrived, depart
from deepseek_train.phases.phase import Move, Phase
from deepseek_train.phases.segment import Gradients, Moved, Returning, Segment, computed
from deepseek_train.phases.tree import differentiable
from deepseek_train.phases.watch import UNWATCHED, Watch


class Tape:
    """Records phases in forward order, gives their gradients in reverse. For one micro-batch in one stage."""

    def __init__(self) -> None:
        self._segments: list[tuple[Phase, Segment] | Moved] = []
        self._gradients: Gradients | Returning | None = None

    def run(self, phase: Phase | Move, value: Any, watch: Watch = UNWATCHED) -> Any:
        """Runs ``phase`` on ``value``, once that has arrived, and records it. A communication is only started: its
        result is ``InTransit``, which the next ``run`` (or ``parcel.arrived``) waits for."""
        value = arrived(value)
        match phase:
            case Move():
                return self._move(phase, value, watch)
            case Phase():
                with watch.computing(phase):
                    segment, result = computed(phase, value)
                self._segments.append((phase, segment))
                return result
            case _:
                assert_never(phase)

    def _move(self, move: Move, parcel: Parcel, watch: Watch) -> InTransit:
        transit, beside = depart(parcel, recorded=True), None
        watch.started(move, transit.pending)
        if move.beside:
            with watch.computing(move.beside):
                beside, stays = computed(move.beside, parcel.stays)
            transit = replace(transit, parcel=replace(parcel, stays=stays))
        num_stays = len(differentiable(transit.parcel.stays))
        self._segments.append(Moved(move, parcel.route, sum(transit.carries), num_stays, beside))
        return transit

    def __len__(self) -> int:
        """Segments that have not run backward yet."""
        return len(self._segments)

    def seed(self, gradients: Gradients) -> None:
        """Gradients of the last phase's differentiable outputs, in tree order. None: nothing flows from there."""
        self._gradients = gradients

    def backward(self, watch: Watch = UNWATCHED) -> None:
        """Runs the last remaining segment backward, once its gradients have arrived. A communication is only started.
        Weight gradients go wherever the segment's functions put them."""
        gradients = self.gradients()
        match self._segments.pop():
            case Moved() as moved:
                self._gradients = moved.backward(gradients, watch)
            case phase, segment:
                with watch.computing(phase):
                    self._gradients = segment.backward(gradients)

    def gradients(self) -> Gradients:
        """Gradients of the inputs of the segment last run backward: of what flowed into the chunk, in the end."""
        match self._gradients:
            case None:
                raise RuntimeError("a tape runs backward only after seed()")
            case Returning():
                return self._gradients.arrived()
            case _:
                return self._gradients
