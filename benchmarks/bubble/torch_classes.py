"""torch.distributed.pipelining's own schedules on stages that sleep."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from benchmarks.bubble.peers import SleepingModule
from benchmarks.bubble.work import DTYPE, ROWS, Contestant, Sleeper, inputs_of_step, loss_of
from deepseek_train.schedule.action import Action, Kind, Pair, Schedule, Step
from deepseek_train.schedule.catalog import make_schedule, placement_of

_SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MULTI = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zb": ScheduleInterleavedZeroBubble,
    "zb_v": ScheduleZBVZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}
NAMES = (*_SINGLE, *_MULTI)


def prepare(name: str, num_microbatches: int, sleeper: Sleeper) -> Contestant:
    """The class for ``name`` on all ranks of the world. Its first step is a warm-up: torch then learns shapes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # the one name that is torch's alone lies as its neighbour does
    placement = placement_of(
        "interleaved_1f1b" if name == "interleaved_zb" else name, world, num_microbatches
    )
    modules = {s: SleepingModule(s, sleeper) for s in placement.stages_of(rank)}
    stages: list[Any] = [
        PipelineStage(m, s, placement.num_stages, torch.device("cpu")) for s, m in modules.items()
    ]
    runner: Any
    if name in _SINGLE:
        runner = _SINGLE[name](stages[0], num_microbatches, loss_fn=_loss)
        schedule = make_schedule(name, world, num_microbatches)
    else:
        runner = _MULTI[name](stages, num_microbatches, loss_fn=_loss)
        rows = tuple(tuple(_steps(runner.pipeline_order[r])) for r in range(world))
        schedule = Schedule(name, placement, rows)
    inputs = (inputs_of_step(num_microbatches).to(DTYPE).flatten(0, 1),) if 0 in modules else ()
    last = {"target": torch.zeros(num_microbatches * ROWS)} if placement.num_stages - 1 in modules else {}

    def step() -> None:
        runner.step(*inputs, **last, return_outputs=False)

    def gradients() -> dict[int, Tensor]:
        return {s: m.weight.grad for s, m in modules.items() if m.weight.grad is not None}

    return Contestant(step, gradients, schedule)


def _loss(y: Tensor, _: Tensor) -> Tensor:
    return loss_of(y)


def _steps(order: list[Any]) -> list[Step]:
    """torch's own list of one rank as our values; its idle slots fall away, its overlap action is a pair."""
    steps: list[Step] = []
    for action in filter(None, order):
        if action.sub_actions is None:
            steps.append(_action(action))
        else:
            forward, backward = map(_action, action.sub_actions)
            steps.append(Pair(forward, backward))
    return steps


def _action(action: Any) -> Action:
    return Action(action.stage_index, Kind(action.computation_type.value), action.microbatch_index)
