"""Contestants take turns on the same ranks, step by step, so that whatever disturbs the machine hits all alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import assert_never

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.bubble import deepspeed_engine, ours, torch_classes
from benchmarks.bubble.work import ChunkTimes, Contestant, Sleeper, true_gradients
from deepseek_train.schedule.action import Action, Kind, Pair, Schedule, Step
from deepseek_train.schedule.dataflow import actions_of
from deepseek_train.schedule.simulate import simulate

PREPARE: dict[str, Callable[[str, int, Sleeper], Contestant]] = {
    "ours": ours.prepare,
    "torch": torch_classes.prepare,
    "deepspeed": deepspeed_engine.prepare,
}


@dataclass(frozen=True)
class Case:
    """Who runs which schedule."""

    who: str  # of ``PREPARE``
    schedule: str

    def __str__(self) -> str:
        return f"{self.who}'s {self.schedule}"


@dataclass(frozen=True)
class Plan:
    """One race. ``times`` None: nobody sleeps, what is left is overhead."""

    cases: tuple[Case, ...]
    num_microbatches: int
    times: ChunkTimes | None
    rounds: int


@dataclass(frozen=True)
class Measured:
    """A case's steps, one entry for each round. Seconds."""

    case: Case
    spans: tuple[float, ...]  # from the barrier until the last rank is done
    slept: tuple[float, ...]  # mean over ranks
    cpu: tuple[float, ...]  # of a rank's main thread, mean over ranks
    chunks: int  # a rank's, each F + I + W
    actions: int  # a rank's: F, B, I and W
    ideal: float | None  # bubble of the same schedule in the simulator, without latency; None without times
    ideal_early: float | None  # the same, of ``sent_early``

    def bubbles(self) -> list[float]:
        """Idle share of all ranks' time, of each round."""
        return [1 - slept / span for slept, span in zip(self.slept, self.spans, strict=True)]


def race(rank: int, world: int, plan: Plan) -> list[Measured]:
    """Runs ``plan`` on all ranks of the world; the same result on each. Before anything is timed each contestant's
    gradients are compared with plain autograd's, and in every step each chunk must have slept once for each of F, I
    and W; RuntimeError otherwise."""
    torch.set_num_threads(1)
    sleeper = Sleeper()
    contestants = {c: PREPARE[c.who](c.schedule, plan.num_microbatches, sleeper) for c in plan.cases}
    for case, contestant in contestants.items():
        contestant.step()
        _check_gradients(case, contestant, plan.num_microbatches)
    sleeper.times = plan.times
    steps: dict[Case, list[Tensor]] = {case: [] for case in plan.cases}
    for _ in range(plan.rounds):
        for case, contestant in contestants.items():
            steps[case].append(_timed(case, contestant, sleeper))
    return [_measured(case, contestants[case].schedule, steps[case], plan.times) for case in plan.cases]


def _timed(case: Case, contestant: Contestant, sleeper: Sleeper) -> Tensor:
    """Start, end, slept, CPU seconds of one step on every rank [ranks, 4]."""
    sleeper.slept = 0.0
    sleeper.counts.clear()
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.thread_time()
    contestant.step()
    cpu, end = time.thread_time() - cpu_start, time.perf_counter()
    chunks, _ = _work_of(contestant.schedule, dist.get_rank())
    counts = {
        kind: sleeper.counts[kind] for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    }
    if set(counts.values()) != {chunks}:
        raise RuntimeError(f"{case} slept {counts} where its {chunks} chunks are one of each")
    mine = torch.tensor([start, end, sleeper.slept, cpu], dtype=torch.float64)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    return torch.stack(everyones)


def _measured(case: Case, schedule: Schedule, steps: list[Tensor], times: ChunkTimes | None) -> Measured:
    starts, ends, slept, cpu = torch.stack(steps).unbind(-1)
    chunks, actions = _work_of(schedule, 0)
    return Measured(
        case,
        spans=tuple((ends.amax(1) - starts.amin(1)).tolist()),
        slept=tuple(slept.mean(1).tolist()),
        cpu=tuple(cpu.mean(1).tolist()),
        chunks=chunks,
        actions=actions,
        ideal=simulate(schedule, times.durations()).bubble_fraction() if times else None,
        ideal_early=simulate(sent_early(schedule), times.durations()).bubble_fraction() if times else None,
    )


def sent_early(schedule: Schedule) -> Schedule:
    """The same work where nothing waits for the end of a full backward or of a pair: I, W, F in sequence. That is how
    the executor runs chunks of one phase."""
    return replace(schedule, steps_R=tuple(tuple(chain(*map(_apart, steps))) for steps in schedule.steps_R))


def _apart(step: Step) -> tuple[Action, ...]:
    match step:
        case Pair(forward, backward):
            return (*_apart(backward), forward)
        case Action(kind=Kind.BACKWARD):
            return replace(step, kind=Kind.BACKWARD_INPUT), replace(step, kind=Kind.BACKWARD_WEIGHT)
        case Action():
            return (step,)
        case _:
            assert_never(step)


def _work_of(schedule: Schedule, rank: int) -> tuple[int, int]:
    """Chunks and actions of one rank."""
    kinds = [action.kind for step in schedule.steps_R[rank] for action in actions_of(step)]
    return kinds.count(Kind.FORWARD), len(kinds)


def _check_gradients(case: Case, contestant: Contestant, num_microbatches: int) -> None:
    truth = torch.stack(true_gradients(contestant.schedule.placement.num_stages, num_microbatches))
    found = torch.zeros_like(truth)
    for stage, gradient in contestant.gradients().items():
        found[stage] += gradient
    dist.all_reduce(found)  # bidirectional schedules: two copies, each with its half of the micro-batches
    error = ((found - truth).abs().amax() / truth.abs().amax()).item()
    if not error < 1e-12:
        raise RuntimeError(f"{case}: gradients differ from plain autograd's by {error:.1e} of the largest")
