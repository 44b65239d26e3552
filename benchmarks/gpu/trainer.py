"""A model that trains on one device as ``deepseek-train`` would wire it (parallel=single, schedule=1f1b), without what
a bare GPU machine lacks: Hydra, DeepSpeed, data. Weights are drawn on the device, from one seed, the same for every
entry.

Legend: B sequences of a micro-batch, T positions, D hidden.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from deepseek_kernels.choice import Kernels
from deepseek_train.config.parse import parse
from deepseek_train.config.schema import CurveConfig, Fp8Config, ModelConfig, OptimConfig
from deepseek_train.fp8.room import Fp8
from deepseek_train.model.context import ModelContext
from deepseek_train.model.stage import Stage
from deepseek_train.optim.balance import update_bias
from deepseek_train.optim.groups import WeightGroup
from deepseek_train.optim.replicated import Replicated
from deepseek_train.parallel.p2p import Links
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.values import Boundary, LossScales
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.spec.stages import split_layers
from deepseek_train.spec.weights import all_weights

# Learning rate (with 5e-5 the fifth step is a spike), speed of router biases, weight of the balance loss.
LR, GAMMA, ALPHA = 1e-5, 1e-3, 1e-4
_FLAT = CurveConfig(1.0)
OPTIM = OptimConfig(lr=_FLAT, batch_size=_FLAT, balance_speed=_FLAT, mtp_weight=_FLAT)
CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Task:
    """What every entry trains: the same tokens in the same order."""

    model: ModelConfig
    sequence_length: int
    sequences: int  # of a micro-batch
    microbatches: int  # of a step

    @property
    def step_tokens(self) -> int:
        return self.microbatches * self.sequences * self.sequence_length


@dataclass(frozen=True)
class Entry:
    """Who computes, and in what. ``fp8`` None: linears in BF16."""

    name: str
    kernels: Kernels
    fp8: Fp8Config | None
    compiled: bool = False  # train.compile


def shipped_model(name: str) -> ModelConfig:
    return parse(ModelConfig, yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text()))


class Trainer:
    """Holds all memory of one entry; ``step`` is one optimizer step."""

    def __init__(self, task: Task, entry: Entry, device: torch.device) -> None:
        m, queue, recompute = task.model, WeightGradQueue(), Recomputation()
        self.task, self.device = task, device
        self.fp8 = None if entry.fp8 is None else Fp8.of(entry.fp8, entry.kernels, queue, recompute)
        context = ModelContext(
            m,
            queue,
            device=device,
            dtype=torch.bfloat16,
            recompute=recompute,
            kernels=entry.kernels,
            fp8=self.fp8,
            compiled=entry.compiled,
        )
        self.stage = Stage(context, split_layers(m, 1)[0], task.sequence_length)
        _initialise(self.stage, m, device)
        decayed = {w.name for w in all_weights(m) if w.decayed}
        groups = [
            WeightGroup(
                {n: w for n, w in self.stage.weights().items() if (n in decayed) == flag}, None, decay
            )
            for flag, decay in ((True, OPTIM.weight_decay), (False, 0.0))
        ]
        self.optimizer = Replicated(groups, None, OPTIM, torch.bfloat16, entry.kernels.optim)
        shape_BTD = task.sequences, task.sequence_length, m.hidden_size
        links = Links({}, ranks=(0,), me=0)  # one rank sends nothing
        self.executor = Executor({0: self.stage}, links, queue, Boundary(shape_BTD, torch.bfloat16, device))
        self.schedule = PreparedSchedule(make_schedule("1f1b", 1, task.microbatches), 0)
        self._tokens = torch.Generator(device).manual_seed(1)

    def step(self) -> Tensor:
        """Forward, backward, clipping, AdamW, router biases; the mean loss, still on the device."""
        count = self.task.microbatches
        scales = LossScales(main=1.0 / count, mtp=0.1 / count, balance=ALPHA / count)
        ran = self.executor.run(self.schedule, lambda _: self._batch(), scales)
        self.optimizer.reduce()
        self.optimizer.step(LR)
        if self.fp8 is not None:
            self.fp8.copies.forget()
        for layer, router in self.stage.routers():
            update_bias(router.bias, ran.loads[layer], GAMMA, OPTIM.balance_rule)
        return torch.stack(list(ran.main.values())).mean()

    def _batch(self) -> MicroBatch:
        """Made-up text: small token ids are more frequent, which can be learnt."""
        task = self.task
        shape = task.sequences, task.sequence_length + 1 + task.model.mtp_depth
        share = torch.rand(shape, generator=self._tokens, device=self.device).square_()
        return MicroBatch((share * task.model.vocab_size).long().clamp_(max=task.model.vocab_size - 1))


@torch.no_grad()
def _initialise(stage: Stage, m: ModelConfig, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for weight in stage.weights().values():
        if weight.ndim > 1:
            weight.normal_(0.0, m.init_std, generator=generator)
        else:
            weight.fill_(1.0)
