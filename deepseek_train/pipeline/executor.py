"""Folds one rank's share of a schedule over its stages: the interpreter that really runs.

Programs come from ``schedule.lower``, the order inside an overlapped pair from ``schedule.overlap``; the
weight-gradient queue and the links are given. Each micro-batch in flight is a tape and nothing else is kept.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import assert_never

import torch

from deepseek_train.parallel.p2p import Links
from deepseek_train.phases.phase import fold
from deepseek_train.phases.tape import Gradients, Tape
from deepseek_train.phases.values import Hidden, Ledger, MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.chunk import BackwardChunk, ForwardChunk
from deepseek_train.pipeline.mail import Mail
from deepseek_train.pipeline.trace import Trace
from deepseek_train.pipeline.values import Boundary, LossScales, PipelineStage, Ran
from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule
from deepseek_train.schedule.dataflow import actions_of, input_of, output_of
from deepseek_train.schedule.lower import Instruction, Program, Receive, Send, lower
from deepseek_train.schedule.overlap import FIGURE_4, Order, Piece, interleave
from deepseek_train.schedule.windows import send_windows


class PreparedSchedule:
    """A schedule with its communication written out for one rank."""

    def __init__(self, schedule: Schedule, pp_rank: int) -> None:
        self.pp_rank = pp_rank
        self.placement: Placement = schedule.placement
        self.program: Program = lower(schedule)[pp_rank]
        self.windows = {link: n for link, n in send_windows(schedule).items() if link[0] == pp_rank}


class StepFailed(RuntimeError):
    """Something went wrong in one action of a schedule; the message names it."""


class Executor:
    """Runs prepared schedules. ``stages`` are this rank's, by index; ``order`` is that of overlapped pairs."""

    def __init__(
        self,
        stages: Mapping[int, PipelineStage],
        links: Links,
        queue: WeightGradQueue,
        boundary: Boundary,
        order: Order = FIGURE_4,
    ) -> None:
        self._stages, self._links, self._queue, self._boundary = stages, links, queue, boundary
        parts = {index: tuple(phase.part for phase in stage.phases) for index, stage in stages.items()}
        self._pieces = {(f, b): interleave(parts[f], parts[b], order) for f in parts for b in parts}

    def run(
        self,
        prepared: PreparedSchedule,
        batch_of: Callable[[int], MicroBatch],
        scales: LossScales | None,
        trace: Trace | None = None,
    ) -> Ran:
        """One pass: a training step's forwards and backwards, or, with ``scales`` None, an evaluation's forwards.
        ``batch_of(m)`` gives micro-batch m; it is asked where m enters and where its loss is computed. Weight
        gradients are in ``main_grad`` afterwards. Raises ``StepFailed``."""
        mail = Mail(self._links, self._boundary, prepared.windows)
        one = _Pass(
            self._stages, self._queue, prepared.placement, self._pieces, mail, batch_of, scales, trace
        )
        try:
            for instruction in prepared.program:
                one.perform(instruction)
            mail.drain()
        except Exception as error:
            raise StepFailed(_failed(prepared.pp_rank, one.doing, error)) from error
        return one.ran


def _failed(pp_rank: int, doing: Action | None, error: Exception) -> str:
    where = "before its first action"
    if doing is not None:
        where = (
            f"{doing} ({doing.kind.name.lower()} of micro-batch {doing.microbatch} in stage {doing.stage})"
        )
    return f"pipeline rank {pp_rank}, {where}: {type(error).__name__}: {error}"


class _Pass:
    """The state of one run: the tapes of micro-batches in flight."""

    def __init__(
        self,
        stages: Mapping[int, PipelineStage],
        queue: WeightGradQueue,
        placement: Placement,
        pieces: Mapping[tuple[int, int], tuple[Piece, ...]],
        mail: Mail,
        batch_of: Callable[[int], MicroBatch],
        scales: LossScales | None,
        trace: Trace | None,
    ) -> None:
        self._stages, self._queue, self._placement, self._pieces = stages, queue, placement, pieces
        self._mail, self._batch_of, self._scales, self._trace = mail, batch_of, scales, trace
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
                with nullcontext() if self._trace is None else self._trace.chunk(*halves):
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
                    hidden = fold(self._stages[action.stage].phases, self._entering(action))
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
                with nullcontext() if self._trace is None else self._trace.compute("weights", action):
                    self._queue.run_oldest()
            case _:
                assert_never(action.kind)

    def _pair(self, forward: Action, backward: Action) -> None:
        """Phases of both in the order of ``schedule.overlap``; either half's result leaves as soon as it is there."""
        f, b = self._forward(forward), self._backward(backward)
        for piece in self._pieces[forward.stage, backward.stage]:
            self.doing = forward if piece.kind is Kind.FORWARD else backward
            match piece.kind:
                case Kind.BACKWARD_INPUT:
                    b.step()
                case Kind.BACKWARD_WEIGHT:
                    b.weights(piece.index)
                case _ if not f.done:
                    f.step()
            if f.closes():
                f.step()

    def _full_backward(self, action: Action) -> None:
        """Where another rank waits for the input gradient it leaves before the weight gradients run; elsewhere each
        phase gives up its memory at once."""
        chunk, message = self._backward(action), output_of(self._placement, action)
        hurried, indices = message is not None and not message.is_local, []
        while not chunk.done:
            indices.append(chunk.step())
            if not hurried:
                chunk.weights(indices.pop())
        for index in indices:
            chunk.weights(index)

    def _forward(self, action: Action) -> ForwardChunk:
        tape = Tape()

        def leave(hidden: Hidden) -> None:
            self._in_flight[action.stage, action.microbatch] = tape, hidden.ledger
            self._leave_forward(action, hidden)

        row = self._stages[action.stage].phases
        return ForwardChunk(action, row, lambda: self._entering(action), leave, tape, self._trace)

    def _entering(self, action: Action) -> MicroBatch | Hidden:
        spec, message = self._stages[action.stage].spec, input_of(self._placement, action)
        batch = self._batch_of(action.microbatch) if spec.first or spec.last else None
        if message is None:
            assert batch is not None
            return batch
        return Hidden(self._mail.take(message).requires_grad_(), batch)

    def _leave_forward(self, action: Action, hidden: Hidden) -> None:
        self.ran.note(action.microbatch, hidden.ledger)
        message = output_of(self._placement, action)
        if message is not None and not self._stages[action.stage].spec.last:
            self._mail.put(message, hidden.x_BTD.detach())

    def _backward(self, action: Action) -> BackwardChunk:
        tape, ledger = self._in_flight.pop((action.stage, action.microbatch))
        row, last = self._stages[action.stage].phases, self._stages[action.stage].spec.last
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

        return BackwardChunk(action, row, enter, leave, tape, self._queue, self._trace)
