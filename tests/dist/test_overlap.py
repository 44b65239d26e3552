"""Overlapped pairs of the real model: what ran on which lane, and that messages leave from inside of a pair."""

import time
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deepseek_train.phases.phase import Move, Phase
from deepseek_train.phases.wgrad import allocate_main_grads
from deepseek_train.pipeline.mail import Mail
from deepseek_train.pipeline.trace import Trace
from deepseek_train.schedule.action import Action, Kind, Pair, Step
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.dataflow import Message, MessageKind, actions_of
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.timeline import PhaseSpan, Span
from tests.dist.grid import Case, OnGrid, on_grid
from tests.dist.tripwire import Tripwire
from tests.harness import run_ranks

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741
CASE = Case("dualpipe", 2, dp=2, ep=2, layers=5, mtp=1)
SECONDS = 1.5  # that a weight gradient sleeps


@dataclass(frozen=True)
class Traced:
    """One rank's pass. ``rows``: of each of its stages the phases, by name and lane."""

    pp_rank: int
    spans: list[Span]
    phases: list[PhaseSpan]
    rows: dict[int, list[tuple[str, Lane]]]


def trained(grid: OnGrid) -> Trace:
    allocate_main_grads([weight for _, weight, _ in grid.weights().values()], torch.float32)
    trace = Trace(grid.mesh.pp_rank, torch.device("cpu"))
    grid.executor.run(grid.prepared(), grid.batch_of(), grid.case.scales, trace)
    return trace


def run_traced(rank: int, _world_size: int) -> Traced:
    grid = on_grid(CASE, rank, torch.float32)
    trace = trained(grid)
    rows = {
        index: [name for phase in stage.phases for name in on_lanes(phase)]
        for index, stage in grid.stages.items()
    }
    return Traced(grid.mesh.pp_rank, trace.spans, trace.phases, rows)


def on_lanes(phase: Phase | Move) -> list[tuple[str, Lane]]:
    if isinstance(phase, Phase):
        return [(phase.name, Lane.COMPUTE)]
    beside = [(phase.beside.name, Lane.COMPUTE)] if phase.beside else []
    return [(phase.name, Lane.COMMUNICATION), *beside]


@pytest.fixture(scope="module")
def traces() -> list[Traced]:
    return run_ranks(run_traced, CASE.layout.world)


def steps(pp_rank: int) -> tuple[Step, ...]:
    return make_schedule(CASE.schedule, CASE.pp, CASE.microbatches).steps_R[pp_rank]


def test_every_phase_is_traced_once_on_its_lane(traces: list[Traced]) -> None:
    for traced in traces:
        found: dict[Action, Counter[tuple[str, Lane]]] = {}
        for p in traced.phases:
            found.setdefault(Action(p.stage, p.kind, p.microbatch), Counter())[p.name, p.lane] += 1
        for action in (a for step in steps(traced.pp_rank) for a in actions_of(step)):
            row = Counter(traced.rows[action.stage])
            weights = found.get(Action(action.stage, W, action.microbatch), Counter())
            match action.kind:
                case Kind.FORWARD:
                    assert found[action] == row
                case Kind.BACKWARD | Kind.BACKWARD_INPUT:
                    inputs = {key: n for key, n in row.items() if "announce" not in key[0]}  # no gradient
                    assert found[Action(action.stage, I, action.microbatch)] == inputs
                case Kind.BACKWARD_WEIGHT:
                    assert weights == Counter({("weights", Lane.COMPUTE): 1})
            if action.kind is B:  # each phase that has weights, and no other
                owners = ("embed", "attend", "shared", "experts", "feed_forward", "head")
                assert Counter({n: c for n, c in names(row).items() if n in owners}) <= names(weights)
                assert names(weights) <= names(row)
                assert {lane for _, lane in weights} == {Lane.COMPUTE}
        assert found.keys() == {half for step in steps(traced.pp_rank) for half in halves(step)}


def names(row: "Counter[tuple[str, Lane]]") -> "Counter[str]":
    return Counter({name: count for (name, lane), count in row.items() if lane is Lane.COMPUTE})


def halves(step: Step) -> list[Action]:
    """What a trace of ``step`` is about: a full backward is input gradients and weight gradients."""
    return [
        Action(a.stage, kind, a.microbatch)
        for a in actions_of(step)
        for kind in ((I, W) if a.kind is B else (a.kind,))
    ]


def test_phases_lie_inside_their_chunks_and_compute_one_at_a_time(traces: list[Traced]) -> None:
    for traced in traces:
        chunk_of = {
            half: (span.start, span.end)
            for span in traced.spans
            for half in halves(Action(span.stage, span.kind, span.microbatch))
        }
        for p in traced.phases:
            start, end = chunk_of[Action(p.stage, p.kind, p.microbatch)]
            assert start <= p.start <= p.end, p
            assert p.start <= end, p
            assert p.end <= end or p.lane is Lane.COMMUNICATION, p  # its end is noted by another thread
        computed = [p for p in traced.phases if p.lane is Lane.COMPUTE]
        assert all(a.end <= b.start for a, b in zip(computed, computed[1:], strict=False))


def test_in_pairs_computations_of_the_other_half_run_beside_transfers(traces: list[Traced]) -> None:
    """How many is for the benchmark to say: here a transfer takes as long as the machine likes."""
    for traced in traces:
        hidden = {
            (str(step), transfer.name, computed.name)
            for step in steps(traced.pp_rank)
            if isinstance(step, Pair)
            for transfer, computed in side_by_side(
                [p for p in traced.phases if Action(p.stage, p.kind, p.microbatch) in halves(step)]
            )
        }
        assert hidden


def side_by_side(phases: list[PhaseSpan]) -> list[tuple[PhaseSpan, PhaseSpan]]:
    """Transfers of one half of a pair with computations of the other half that share time with them."""
    return [
        (t, c)
        for t in phases
        for c in phases
        if (t.lane, c.lane) == (Lane.COMMUNICATION, Lane.COMPUTE)
        and (t.kind is F) != (c.kind is F)
        and min(t.end, c.end) > max(t.start, c.start)
    ]


@dataclass(frozen=True)
class Slow:
    """Rank 1 of a pipeline of two sleeps in the last weight gradients of ``weights`` in its step ``step``; ``sent`` are
    the messages that rank 0 waits for meanwhile."""

    step: str
    weights: Action
    sent: tuple[Message, ...]

    def __str__(self) -> str:
        return self.step


SLOW = [
    Slow(
        "0F6&1B1",
        Action(1, W, 1),
        (Message(MessageKind.ACTIVATION, 1, 6, 1, 0), Message(MessageKind.GRADIENT, 0, 1, 1, 0)),
    ),
    Slow("1B3", Action(1, W, 3), (Message(MessageKind.GRADIENT, 0, 3, 1, 0),)),
]


class Noting:
    """``Mail.take`` that writes down when each message was there (of the clock that all processes share)."""

    def __init__(self) -> None:
        self.at: dict[Message, float] = {}
        self._take = Mail.take

    def __call__(self, mail: Mail, message: Message) -> Tensor:
        tensor = self._take(mail, message)
        self.at[message] = time.monotonic()
        return tensor


def run_slow(rank: int, _world_size: int, slow: Slow) -> tuple[dict[Message, float], list[float]]:
    """When messages were there, and when the sleep began and ended."""
    case = Case("dualpipe", 2, layers=4, mtp=0)
    grid, slept = on_grid(case, rank, torch.float32), list[float]()

    def sleep() -> None:
        slept.append(time.monotonic())
        time.sleep(SECONDS)
        slept.append(time.monotonic())

    if rank == 1:
        wire = Tripwire(make_schedule("dualpipe", 2, 8), 1, slow.weights, sleep)
        wire.stretch(grid.stages[1], in_front=True)
        grid = grid.with_new_executor()
    noting = Noting()
    setattr(Mail, "take", lambda mail, message: noting(mail, message))  # noqa: B010  (in this process alone)
    trained(grid)
    return noting.at, slept


@pytest.mark.parametrize("slow", SLOW, ids=str)
def test_messages_leave_before_the_weight_gradients_they_need_not_wait_for(slow: Slow) -> None:
    assert slow.step in {str(step) for step in make_schedule("dualpipe", 2, 8).steps_R[1]}
    (arrived, _), (_, (_, woke)) = run_ranks(run_slow, 2, slow)
    for message in slow.sent:
        assert arrived[message] < woke - SECONDS / 3, message
