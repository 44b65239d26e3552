"""Folds one rank's share of a schedule over its stages: the interpreter that really runs.

Programs come from ``schedule.lower``; shapes on the links come from the caller; the weight-gradient queue and the links
are given. Each micro-batch in flight is a tape and nothing else is kept.

Legend: B sequences, T positions, D hidden, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor

from deepseek_train.parallel.p2p import Arriving, Links
from deepseek_train.phases.phase import Phase, fold
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.values import Hidden, Ledger, MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.trace import Trace
from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule
from deepseek_train.schedule.dataflow import Message, actions_of, input_of, output_of
from deepseek_train.schedule.lower import Program, Receive, Send, lower, sends_in_flight
from deepseek_train.spec.stages import StageSpec


class PipelineStage(Protocol):
    """What the executor asks of a stage: phases from a ``MicroBatch`` (first stage) or ``Hidden`` to ``Hidden``."""

    @property
    def spec(self) -> StageSpec: ...
    @property
    def phases(self) -> tuple[Phase, ...]: ...


@dataclass(frozen=True)
class Boundary:
    """The tensor that passes between stages: one micro-batch of hidden states."""

    shape_BTD: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LossScales:
    """What each loss of one micro-batch counts in the gradient (its weight / micro-batches of the global batch)."""

    main: float
    mtp: float
    balance: float


@dataclass
class Ran:
    """What a pass over a schedule brought about on this rank. Losses are detached scalars in nats."""

    main: dict[int, Tensor] = field(default_factory=dict)  # by micro-batch, on the rank of its last stage
    mtp: dict[int, Tensor] = field(default_factory=dict)
    balance: list[Tensor] = field(default_factory=list)  # one for each (stage with experts, micro-batch)
    loads: dict[int, Tensor] = field(default_factory=dict)  # layer -> tokens per expert [E], summed

    def note(self, microbatch: int, ledger: Ledger) -> None:
        if ledger.main is not None:
            self.main[microbatch] = ledger.main.detach()
        if ledger.mtp is not None:
            self.mtp[microbatch] = ledger.mtp.detach()
        if ledger.balance is not None:
            self.balance.append(ledger.balance.detach())
        for load in ledger.loads:
            known = self.loads.get(load.layer)
            self.loads[load.layer] = load.tokens_E if known is None else known + load.tokens_E


class PreparedSchedule:
    """A schedule with its communication written out for one rank."""

    def __init__(self, schedule: Schedule, pp_rank: int) -> None:
        self.placement: Placement = schedule.placement
        self.program: Program = lower(schedule)[pp_rank]
        self.windows = {t: n for (s, t), n in sends_in_flight(schedule).items() if s == pp_rank}


class Executor:
    """Runs prepared schedules. ``stages`` are this rank's, by index."""

    def __init__(
        self, stages: Mapping[int, PipelineStage], links: Links, queue: WeightGradQueue, boundary: Boundary
    ) -> None:
        self._stages, self._links, self._queue, self._boundary = stages, links, queue, boundary

    def run(
        self,
        prepared: PreparedSchedule,
        batch_of: Callable[[int], MicroBatch],
        scales: LossScales | None,
        trace: Trace | None = None,
    ) -> Ran:
        """One pass: a training step's forwards and backwards, or, with ``scales`` None, an evaluation's forwards.
        ``batch_of(m)`` gives micro-batch m; it is asked where m enters and where its loss is computed. Weight
        gradients are in ``main_grad`` afterwards."""
        run = _Pass(self._stages, self._queue, prepared.placement, batch_of, scales)
        arriving: dict[Message, Arriving] = {}
        for instruction in prepared.program:
            match instruction:
                case Receive(message):
                    arriving[message] = self._receive(message)
                case Send(message):
                    self._links.send(run.mail.pop(message), message.target, prepared.windows[message.target])
                case Action() | Pair():
                    halves = actions_of(instruction)
                    for action in halves:
                        needed = input_of(prepared.placement, action)
                        if needed is not None and needed in arriving:
                            run.mail[needed] = arriving.pop(needed).wait()
                        if trace is None:
                            run.do(action)
                        else:
                            with trace.span(action, paired=len(halves) == 2):
                                run.do(action)
                case _:
                    assert_never(instruction)
        self._links.drain()
        return run.ran

    def _receive(self, message: Message) -> Arriving:
        b = self._boundary
        return self._links.receive(b.shape_BTD, b.dtype, b.device, message.source)


class _Pass:
    """The state of one run: tapes of micro-batches in flight and the tensors that wait between actions."""

    def __init__(
        self,
        stages: Mapping[int, PipelineStage],
        queue: WeightGradQueue,
        placement: Placement,
        batch_of: Callable[[int], MicroBatch],
        scales: LossScales | None,
    ) -> None:
        self._stages, self._queue, self._placement = stages, queue, placement
        self._batch_of, self._scales = batch_of, scales
        self._in_flight: dict[tuple[int, int], tuple[Tape, Ledger]] = {}
        self.mail: dict[Message, Tensor] = {}
        self.ran = Ran()

    def do(self, action: Action) -> None:
        match action.kind:
            case Kind.FORWARD:
                self._forward(action)
            case Kind.BACKWARD:
                self._backward(action, weights_now=True)
            case Kind.BACKWARD_INPUT:
                self._backward(action, weights_now=False)
                self._queue.seal()
            case Kind.BACKWARD_WEIGHT:
                self._queue.run_oldest()
            case _:
                assert_never(action.kind)

    def _forward(self, action: Action) -> None:
        stage = self._stages[action.stage]
        value: Any = self._entering(action, stage.spec)
        if self._scales is None:
            with torch.no_grad():
                hidden: Hidden = fold(stage.phases, value)
        else:
            tape = Tape()
            for phase in stage.phases:
                value = tape.run(phase, value)
            hidden = value
            self._in_flight[action.stage, action.microbatch] = tape, hidden.ledger
        self.ran.note(action.microbatch, hidden.ledger)
        message = output_of(self._placement, action)
        if message is not None and not stage.spec.last:
            self.mail[message] = hidden.x_BTD.detach()

    def _entering(self, action: Action, spec: StageSpec) -> MicroBatch | Hidden:
        batch = self._batch_of(action.microbatch) if spec.first or spec.last else None
        message = input_of(self._placement, action)
        if message is None:
            assert batch is not None
            return batch
        return Hidden(self.mail.pop(message).requires_grad_(), batch)

    def _backward(self, action: Action, *, weights_now: bool) -> None:
        tape, ledger = self._in_flight.pop((action.stage, action.microbatch))
        message = input_of(self._placement, action)
        assert message is not None
        assert self._scales is not None
        # The last stage's own forward is what its backward waits for: no gradient comes from outside.
        outer = None if self._stages[action.stage].spec.last else self.mail.pop(message)
        tape.seed([outer, *_loss_gradients(ledger, self._scales)])
        gradients: list[Tensor | None] = []
        while len(tape):
            gradients = tape.backward()
            if weights_now:
                self._queue.run_open()
        message = output_of(self._placement, action)
        if message is not None:
            (gradient,) = gradients
            assert gradient is not None
            self.mail[message] = gradient


def _loss_gradients(ledger: Ledger, scales: LossScales) -> list[Tensor]:
    """Gradients of the ledger's losses, in field order."""
    losses = ((ledger.main, scales.main), (ledger.mtp, scales.mtp), (ledger.balance, scales.balance))
    return [torch.full_like(loss, scale) for loss, scale in losses if loss is not None]
