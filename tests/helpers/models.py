"""Small models and batches that the tests share."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels.choice import ON_CPU, Kernels
from deepseek_train.config.schema import Forgettable, Fp8Config, ModelConfig, YarnConfig
from deepseek_train.fp8.room import Fp8
from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import Weight, WeightGradQueue, allocate_main_grads
from deepseek_train.spec.stages import split_layers

# 16 experts in 4 groups of which a token uses 2, top-4: a group counts its best 4 / 2 = 2 scores.
TINY = ModelConfig(
    name="tiny",
    vocab_size=96,
    hidden_size=32,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    q_lora_rank=12,
    kv_lora_rank=16,
    dense_ffn_size=40,
    num_routed_experts=16,
    num_shared_experts=1,
    expert_ffn_size=16,
    experts_per_token=4,
    num_expert_groups=4,
    expert_groups_per_token=2,
    routed_scale=2.5,
    mtp_depth=1,
    init_std=0.12,
)
YARN = YarnConfig(factor=4.0, original_length=32, mscale=1.0, mscale_all_dim=0.7)


def tiny(**changes: Any) -> ModelConfig:
    return replace(TINY, **changes)


def whole_model(
    m: ModelConfig,
    *,
    length: int,
    dtype: torch.dtype = torch.float32,
    grads: torch.dtype | None = None,
    recompute: frozenset[Forgettable] = frozenset(),
    fp8: Fp8Config | None = None,
    kernels: Kernels = ON_CPU,
) -> Stage:
    """All layers as one stage, with norm gains around 1 and router biases around 0 instead of exactly
    there."""
    (spec,) = split_layers(m, 1)
    queue, forgets = WeightGradQueue(), Recomputation(recompute)
    precision = None if fp8 is None else Fp8.of(fp8, kernels, queue, forgets)
    context = ModelContext(m, queue, dtype=dtype, recompute=forgets, kernels=kernels, fp8=precision)
    stage = Stage(context, spec, length)
    init_stage(stage, m, seed=1)
    disturb(stage, seed=2)
    allocate_main_grads(list(stage.weights().values()), grads or torch.float32)
    return stage


@torch.no_grad()
def disturb(stage: Stage, seed: int) -> None:
    """Gains and biases away from their initial values, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for weight in stage.weights().values():
        if weight.ndim == 1:
            weight.copy_(1.0 + 0.3 * torch.randn(weight.shape, generator=generator))
    for _, router in stage.routers():
        router.bias.copy_(0.05 * torch.randn(router.bias.shape, generator=generator))


def random_batch(m: ModelConfig, batch: int, length: int, seed: int = 3) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    return MicroBatch(torch.randint(m.vocab_size, (batch, length + 1 + m.mtp_depth), generator=generator))


def table_tensors(stage: Stage) -> dict[str, Tensor]:
    """Weights and router biases of ``stage`` by their name in ``spec.weights``."""
    tensors: dict[str, Tensor] = {name: weight.detach() for name, weight in stage.weights().items()}
    m = stage.context.model
    for index, router in stage.routers():
        depth = index - m.num_layers
        name = f"layers.{index}" if depth < 0 else f"mtp.{depth}.block"
        tensors[f"{name}.router.bias"] = router.bias
    return tensors


def main_grads(stage: Stage) -> dict[str, Tensor]:
    weights: dict[str, Weight] = stage.weights()
    return {name: weight.main_grad for name, weight in weights.items()}
