"""One pass over a rank's steps: every action becomes its phases, in the order that the schedule and
``schedule.overlap`` say. Each micro-batch in flight is a tape, and nothing else is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import assert_never

import torch

from deepseek_train.phases.phase import Row, fold
from deepseek_train.phases.segment import Gradients
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.values import Hidden, Ledger, MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.chunk import BackwardChunk, ForwardChunk
from deepseek_train.pipeline.mail import Mail
from deepseek_train.pipeline.trace import Recorder
from deepseek_train.pipeline.values import LossScales, PipelineStage, Ran
from deepseek_train.schedule.action import Action, Kind, Pair, Placement
from deepseek_train.schedule.dataflow import actions_of, input_of, output_of
from deepseek_train.schedule.lower import Instruction, Receive, Send
from deepseek_train.schedule.overlap import Order, Piece, interleave
from deepseek_train.spec.stages import StageSpec


@dataclass(frozen=True)
class StageRows:
    """What stays the same from pass to pass: phases and place of every stage, and how two of them interleave (None: a
    backward without a forward beside it)."""

    rows: Mapping[int, Row]
    specs: Mapping[int, StageSpec]
    pieces: Mapping[tuple[int | None, int], tuple[Piece, ...]]
    queue: WeightGradQueue

    @staticmethod
    def of(stages: Mapping[int, PipelineStage], queue: WeightGradQueue, order: Order) -> "StageRows":
        rows = {index: stage.phases for index, stage in stages.items()}
        parts = {index: tuple(phase.part for phase in row) for index, row in rows.items()}
        pieces = {
            (f, b): interleave(parts[f] if f is not None else (), parts[b], order)
            for f in (None, *rows)
            for b in rows
        }
        return StageRows(rows, {index: stage.spec for index, stage in stages.items()}, pieces, queue)


class Pass:
    """The state of one run: the tapes of micro-batches in flight."""

    def __init__(
        self,
        stages: StageRows,
        placement: Placement,
        mail: Mail,
        batch_of: Callable[[int], MicroBatch],
        scales: LossScales | None,
        trace: Recorder,
    ) -> None:
        self._stages, self._placement, self._mail = stages, placement, mail
        self._batch_of, self._scales, self._trace = batch_of, scales, trace
        self._in_flight: dict[tuple[int, int], tuple[Tape, Ledger]] = {}
        self.ran = Ran()
        self.doing: Action | None = None

    def perform(self, instruction: Instruction) -> None:
        match instruction:
            case Receive(message):
                self._mail.expect(message)
            case Send():
                pass  # the tensor left as soon as it was there
            case Action() | Pair():
                halves = actions_of(instruction)
                with self._trace.chunk(*halves):
                    self._do(instruction)
            case _:
                assert_never(instruction)

    def _do(self, step: Action | Pair) -> None:
        self.doing = actions_of(step)[0]
        match step:
            case Pair(forward, backward):
                self._pair(forward, backward)
            case Action():
                self._alone(step)
            case _:
                assert_never(step)

    def _alone(self, action: Action) -> None:
        match action.kind:
            case Kind.FORWARD if self._scales is None:
                with torch.no_grad():
                    hidden = fold(self._stages.rows[action.stage], self._entering(action))
                self._leave_forward(action, hidden)
            case Kind.FORWARD:
                forward = self._forward(action)
                while not forward.done:
                    forward.step()
            case Kind.BACKWARD:
                self._full_backward(action)
            case Kind.BACKWARD_INPUT:
                backward = self._backward(action)
                while not backward.done:
                    backward.step()
                backward.keep_weights()
            case Kind.BACKWARD_WEIGHT:
                with self._trace.compute("weights", action):
                    self._stages.queue.run_oldest()
            case _:
                assert_never(action.kind)

    def _pair(self, forward: Action, backward: Action) -> None:
        """Phases of both in the order of ``schedule.overlap``; either half's result leaves as soon as it is there."""
        f, b = self._forward(forward), self._backward(backward)
        for piece in self._stages.pieces[forward.stage, backward.stage]:
            self.doing = forward if piece.kind is Kind.FORWARD else backward
            match piece.kind:
                case Kind.FORWARD:
                    if not f.done:  # it may have closed early
                        f.step()
                case Kind.BACKWARD_INPUT:
                    b.step()
                case Kind.BACKWARD_WEIGHT:
                    b.weights(piece.index)
                case _:
                    raise AssertionError(f"a pair has no piece of kind {piece.kind}")
            if f.closes():
                self.doing = forward
                f.step()

    def _full_backward(self, action: Action) -> None:
        """Where another rank waits for the input gradient it leaves before any weight gradient runs; elsewhere the
        order is that of a pair without a forward, in which weight gradients hide the exchanges."""
        chunk, message = self._backward(action), output_of(self._placement, action)
        if message is not None and not message.is_local:
            indices = []
            while not chunk.done:
                indices.append(chunk.step())
            for index in indices:
                chunk.weights(index)
            return
        for piece in self._stages.pieces[None, action.stage]:
            if piece.kind is Kind.BACKWARD_INPUT:
                chunk.step()
            else:
                chunk.weights(piece.index)

    def _forward(self, action: Action) -> ForwardChunk:
        tape = Tape()

        def leave(hidden: Hidden) -> None:
            self._in_flight[action.stage, action.microbatch] = tape, hidden.ledger
            self._leave_forward(action, hidden)

        row = self._stages.rows[action.stage]
        return ForwardChunk(action, row, lambda: self._entering(action), leave, tape, self._trace)

    def _entering(self, action: Action) -> MicroBatch | Hidden:
        spec, message = self._stages.specs[action.stage], input_of(self._placement, action)
        batch = self._batch_of(action.microbatch) if spec.first or spec.last else None
        if message is None:
            assert batch is not None
            return batch
        return Hidden(self._mail.take(message).requires_grad_(), batch)

    def _leave_forward(self, action: Action, hidden: Hidden) -> None:
        self.ran.note(action.microbatch, hidden.ledger)
        message = output_of(self._placement, action)
        if message is not None and not self._stages.specs[action.stage].last:
            self._mail.put(message, hidden.x_BTD.detach())

    def _backward(self, action: Action) -> BackwardChunk:
        tape, ledger = self._in_flight.pop((action.stage, action.microbatch))
        row, last = self._stages.rows[action.stage], self._stages.specs[action.stage].last
        came, goes = input_of(self._placement, action), output_of(self._placement, action)

        def enter() -> Gradients:
            assert came is not None
            assert self._scales is not None
            # The last stage's own forward is what its backward waits for: no gradient comes from outside.
            return [None if last else self._mail.take(came), *self._scales.gradients(ledger)]

        def leave(gradients: Gradients) -> None:
            if goes is not None:
                (gradient,) = gradients
                assert gradient is not None
                self._mail.put(goes, gradient)

        return BackwardChunk(action, row, enter, leave, tape, self._stages.queue, self._trace)
