"""This project's executor on stages that sleep."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from benchmarks.bubble.work import (
    DTYPE,
    ROWS,
    WIDTH,
    Contestant,
    Sleeper,
    initial_weight,
    inputs_of_step,
    loss_of,
)
from deepseek_train.model.linear import linear
from deepseek_train.parallel.p2p import Channel, Links
from deepseek_train.phases.phase import Phase
from deepseek_train.phases.values import Hidden, Ledger, MicroBatch
from deepseek_train.phases.wgrad import Weight, WeightGradQueue, allocate_main_grads
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.values import Boundary, LossScales
from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.dataflow import MessageKind
from deepseek_train.schedule.overlap import Role
from deepseek_train.spec.stages import StageSpec


class _SleepBackward(Function):
    """The identity; its input gradient takes I, its weight gradient, queued, takes W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleeper: Sleeper, queue: WeightGradQueue) -> Tensor:
        ctx.sleeper, ctx.queue = sleeper, queue
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        sleeper = ctx.sleeper
        sleeper.sleep(Kind.BACKWARD_INPUT)
        ctx.queue.add(lambda: sleeper.sleep(Kind.BACKWARD_WEIGHT))
        return dy, None, None


class SleepingStage:
    """A ``PipelineStage`` of one compute phase."""

    def __init__(self, index: int, num_stages: int, sleeper: Sleeper, queue: WeightGradQueue) -> None:
        first, last = index == 0, index == num_stages - 1
        self.spec = StageSpec(index, (index,), first=first, last=last, mtp_depth=0)
        self.phases = (Phase("chunk", Role.ATTEND, self._chunk),)
        self.weight = Weight(initial_weight(index))
        allocate_main_grads([self.weight], DTYPE)
        self._sleeper, self._queue = sleeper, queue

    def _chunk(self, value: MicroBatch | Hidden) -> Hidden:
        self._sleeper.sleep(Kind.FORWARD)
        hidden = Hidden(value.tokens.to(DTYPE)) if isinstance(value, MicroBatch) else value
        y = _SleepBackward.apply(linear(hidden.x_BTD, self.weight, self._queue), self._sleeper, self._queue)
        return Hidden(y, ledger=Ledger(main=loss_of(y)) if self.spec.last else Ledger())


def prepare(name: str, num_microbatches: int, sleeper: Sleeper) -> Contestant:
    """``name`` of the catalog on all ranks of the world (collective: makes groups)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    schedule = make_schedule(name, world, num_microbatches)
    queue = WeightGradQueue()
    num_stages = schedule.placement.num_stages
    stages = {s: SleepingStage(s, num_stages, sleeper, queue) for s in schedule.placement.stages_of(rank)}
    channels = {kind: Channel(down=dist.new_group(), up=dist.new_group()) for kind in MessageKind}
    links = Links(channels, ranks=tuple(range(world)), me=rank)
    executor = Executor(stages, links, queue, Boundary((1, ROWS, WIDTH), DTYPE, torch.device("cpu")))
    prepared = PreparedSchedule(schedule, rank)
    batches = [MicroBatch(tokens) for tokens in inputs_of_step(num_microbatches).split(1)]
    scales = LossScales(main=1 / num_microbatches, mtp=0.0, balance=0.0)

    def step() -> None:
        executor.run(prepared, batches.__getitem__, scales)

    return Contestant(
        step=step,
        gradients=lambda: {s: stage.weight.main_grad for s, stage in stages.items()},
        schedule=schedule,
    )
