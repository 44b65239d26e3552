"""DeepSpeed's own DualPipeV engine on stages that sleep. It has no split backward: its W runs inside B."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe import schedule as instructions
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch import Tensor

from benchmarks.bubble.peers import SleepingModule
from benchmarks.bubble.work import DTYPE, ROWS, Contestant, Sleeper, inputs_of_step, loss_of
from deepseek_train.optim.quiet_deepspeed import adopt_process_group
from deepseek_train.schedule.catalog import make_schedule

NAMES = ("dualpipe_v",)


def prepare(name: str, num_microbatches: int, sleeper: Sleeper) -> Contestant:
    """The engine on all ranks of the world, without gradient reduction and optimizer step; ``train_batch`` still tells
    every rank the loss, at the end of a step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.setdefault("LOCAL_RANK", str(rank))  # it asks for it even without a GPU
    adopt_process_group()
    layers = [LayerSpec(SleepingModule, stage, sleeper) for stage in range(2 * world)]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
        module = DualPipeVModule(
            layers, num_stages=world, loss_fn=lambda y, _: loss_of(y), partition_method="uniform"
        )
    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": num_microbatches,
        "steps_per_print": None,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
    left_out = (instructions.ReduceTiedGrads, instructions.ReduceGrads, instructions.OptimizerStep)
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **dict.fromkeys(left_out, _nothing)}

    def step() -> None:
        engine.train_batch(_batches(num_microbatches))

    def gradients() -> dict[int, Tensor]:
        own = {rank: 0, 2 * world - 1 - rank: 1}
        found = {s: module.phase_funcs[phase][0].weight.grad for s, phase in own.items()}
        return {s: grad for s, grad in found.items() if grad is not None}

    return Contestant(step, gradients, make_schedule(name, world, num_microbatches))


def _batches(num_microbatches: int) -> Iterator[tuple[Tensor, Tensor]]:
    for tokens in inputs_of_step(num_microbatches):
        yield tokens.to(DTYPE), torch.zeros(ROWS)


def _nothing(engine: Any) -> None:
    """Instead of an instruction after the pipeline has drained."""
