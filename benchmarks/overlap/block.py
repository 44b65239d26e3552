"""Layers of the real model, on ranks whose computations take the times of an accelerator.

A few CPU cores are no accelerators: what the phases really compute is small, and each sleeps until its set time is
over. That leaves the cores to the network's threads, as an accelerator does.

Legend: B sequences, T positions, D hidden.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.overlap.times import F, I, block_times
from deepseek_kernels.formats import TILE
from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.parallel.expert.dispatcher import two_hop
from deepseek_train.parallel.expert.group import ExpertGroup
from deepseek_train.parallel.expert.journey import WireFormats
from deepseek_train.parallel.expert.wire import WireFormat
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue, allocate_main_grads
from deepseek_train.pipeline.trace import Trace
from deepseek_train.schedule.action import Action, Kind
from deepseek_train.schedule.overlap import FIGURE_4, ROUTERS_FIRST, Order
from deepseek_train.spec.stages import StageSpec

FORMATS = WireFormats(WireFormat.FP8, WireFormat.BF16)  # as V3
ORDERS: dict[str, Order | None] = {
    "paired": FIGURE_4,
    "paired, routers first": ROUTERS_FIRST,
    "in sequence": None,
}
_VOCABULARY = 64
_TOP_K = 4


@dataclass(frozen=True)
class Work:
    """What every rank does. Rows are wide and all else is narrow: much to send, little to compute."""

    nodes: int
    ranks_per_node: int
    layers: int
    tokens: int  # of a micro-batch
    hidden: int
    stretch: float  # how much slower than the trace
    pairs: int  # in each round
    rounds: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def times(self) -> dict[tuple[str, Kind], float]:
        return block_times(self.stretch)

    @property
    def compute(self) -> float:
        """Seconds that a forward and a backward compute."""
        return self.layers * sum(self.times.values())

    def transfers(self, ratio: float) -> dict[tuple[str, Kind], float]:
        """Seconds of each transfer of a layer on the link alone, ``ratio`` of the compute in all, by its bytes."""
        fp8, bf16, weights = self.hidden + self.hidden // TILE, 2 * self.hidden, 4 * _TOP_K
        per_token = {
            ("announce", F): 2 * _TOP_K,
            ("dispatch", F): fp8 + weights,
            ("combine", F): bf16,
            ("combine", I): fp8,
            ("dispatch", I): bf16 + weights,
        }
        second = ratio * sum(self.times.values()) / sum(per_token.values())
        return {key: num_bytes * second for key, num_bytes in per_token.items()}


def model_of(work: Work) -> ModelConfig:
    """Tokens may go to all nodes; four experts on each rank."""
    return ModelConfig(
        name="wide rows",
        vocab_size=_VOCABULARY,
        hidden_size=work.hidden,
        num_layers=work.layers,
        num_dense_layers=0,
        num_heads=2,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        q_lora_rank=16,
        kv_lora_rank=16,
        dense_ffn_size=16,
        num_routed_experts=4 * work.ranks,
        num_shared_experts=1,
        expert_ffn_size=16,
        experts_per_token=_TOP_K,
        num_expert_groups=work.nodes,
        expert_groups_per_token=min(work.nodes, 2),
        routed_scale=2.5,
        init_std=0.04,
        embed_init_std=1.0,
    )


def make_block_stage(work: Work, group: ExpertGroup, queue: WeightGradQueue) -> Stage:
    """Embedding, ``MoeBlock`` layers, head."""
    m = model_of(work)
    context = ModelContext(m, queue, two_hop(group, FORMATS))
    spec = StageSpec(0, tuple(range(work.layers)), first=True, last=True, mtp_depth=0, embeds=True)
    stage = Stage(context, spec, work.tokens)
    init_stage(stage, m, seed=0)
    allocate_main_grads(list(stage.weights().values()), torch.float32)
    return stage


def batch_of(work: Work, rank: int, microbatch: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(1000 * rank + microbatch)
    tokens_BT: Tensor = torch.randint(_VOCABULARY, (1, work.tokens + 1), generator=generator)
    return MicroBatch(tokens_BT)


class Accelerator(Trace):
    """A trace in which computations last at least their set times: they sleep for the rest. ``worked``: seconds of CPU
    that they really took; ``late``: seconds by which they came after their set times."""

    def __init__(self, times: Mapping[tuple[str, Kind], float]) -> None:
        super().__init__(0, torch.device("cpu"))
        self._times = times
        self.worked = self.late = 0.0

    @contextmanager
    def compute(self, name: str, action: Action) -> Iterator[None]:
        with super().compute(name, action):
            end, worked_before = (
                time.perf_counter() + self._times.get((name, action.kind), 0.0),
                time.thread_time(),
            )
            yield
            self.worked += time.thread_time() - worked_before
            done = time.perf_counter()
            self.late += max(0.0, done - end)
            time.sleep(max(0.0, end - done))
