"""ZeRO-1 by DeepSpeed, without hooks: its BF16_Optimizer under a schedule of our own.

DeepSpeed owns the flat buffers: low-precision weights, FP32 gradients (``weight.main_grad`` are views of them), the
FP32 master shard and its moments. What this subclass changes: each group is reduced by a true reduce-scatter over its
own replicas (stock DeepSpeed all-reduces), and one norm spans all shards of the job, so stages may differ.
Relies on BF16_Optimizer's fields as they are in deepspeed 0.17 to 0.19; tests hold it to ``replicated``.
"""

import contextlib
import io
import math

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_kernels.choice import ON_CPU
from deepseek_train.config.schema import OptimConfig
from deepseek_train.optim.adamw import AdamW
from deepseek_train.optim.groups import (
    Fragment,
    Objection,
    StepOutcome,
    WeightGroup,
    no_objection,
    refusal,
    split_flat,
)
from deepseek_train.optim.quiet_deepspeed import (
    BF16_Optimizer,
    DeepSpeedBF16Config,
    NoopTimer,
    clip_tensors_by_global_norm,
    get_global_norm_of_tensors,
)


class _NormGroup:
    """All that BF16_Optimizer asks of a model-parallel unit: over whom its one norm is summed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group

    def get_tensor_model_parallel_rank(self) -> int:
        return 0


class _HookFree(BF16_Optimizer):
    """BF16_Optimizer with a replica group for each parameter group."""

    def __init__(self, base: AdamW, groups: list[WeightGroup], world: dist.ProcessGroup, clip: float) -> None:
        self._replicas = [group.replicas for group in groups]
        names = {weight: name for group in groups for name, weight in group.weights.items()}
        super().__init__(
            base,
            names,
            bfloat16_config=DeepSpeedBF16Config(enabled=True),
            mpu=_NormGroup(world),
            clip_grad=clip,
            dp_process_group=self._replicas[0],
            timers=NoopTimer(),
            grad_acc_dtype=torch.float32,
            has_moe_layers=True,
        )

    def _configure_moe_settings(self) -> None:
        # Called by __init__: our table instead of DeepSpeed's private dictionaries, and a single norm over all shards
        # instead of one collective for each kind of group, which stages with different groups could not match.
        self.real_dp_process_group = list(self._replicas)
        self.has_moe_layers = False

    def norm(self) -> Tensor:
        """Of all shards of the job (collective); -1 where it is not finite."""
        return get_global_norm_of_tensors(self.fp32_groups_gradient_flat_partition, mpu=self.mpu)

    def update(self, norm: Tensor) -> None:
        """Clip, AdamW on the shard, all-gather: BF16_Optimizer.step without its verdict on the norm."""
        shards = self.fp32_groups_gradient_flat_partition
        if self.clip_grad > 0.0:
            clip_tensors_by_global_norm(shards, max_norm=self.clip_grad, global_norm=norm)
        for master, shard in zip(self.fp32_groups_flat_partition, shards, strict=True):
            master.grad = shard
        self.optimizer.step()
        self.update_lp_params()


class Zero1:
    """A ``DistributedOptimizer`` whose state is sharded over each group's replicas. Every group needs ``replicas``."""

    def __init__(
        self,
        groups: list[WeightGroup],
        world: dist.ProcessGroup,
        config: OptimConfig,
        moments: torch.dtype,
        backend: str = ON_CPU.optim,
    ) -> None:
        self._groups = groups
        self._base = AdamW(
            [{"params": list(g.weights.values()), "weight_decay": g.weight_decay} for g in groups],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            moments=moments,
            backend=backend,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory reports
            self._inner = _HookFree(self._base, groups, world, config.clip_norm)
        for group, gradients in zip(groups, self._inner.fp32_groups_gradients, strict=True):
            for weight, gradient in zip(group.weights.values(), gradients, strict=True):
                weight.main_grad = gradient.view(weight.shape)

    @torch.no_grad()
    def reduce(self) -> None:
        inner = self._inner
        for group, flat, shard in zip(
            self._groups,
            inner.fp32_groups_gradients_flat,
            inner.fp32_groups_gradient_flat_partition,
            strict=True,
        ):
            if dist.get_world_size(group.replicas) > 1:
                total = torch.empty_like(shard)
                dist.reduce_scatter_tensor(total, flat, group=group.replicas)
                shard.copy_(total)

    @torch.no_grad()
    def step(self, lr: float, objection: Objection = no_objection) -> StepOutcome:
        total = self._inner.norm()
        value = float(total)  # the device is waited for once
        norm = value if value >= 0.0 else math.inf
        refused = refusal(norm, objection)
        if refused is None:
            for param_group in self._base.param_groups:
                param_group["lr"] = lr
            self._inner.update(total)
        self._inner.clear_hp_grads()
        return StepOutcome(norm, refused)

    def fragments(self) -> list[Fragment]:
        self._base.materialise()
        found = []
        for group, master in zip(self._groups, self._inner.fp32_groups_flat_partition, strict=True):
            start = dist.get_rank(group.replicas) * master.numel()
            sizes = [weight.numel() for weight in group.weights.values()]
            state = self._base.state[master]
            for name, within, at, count in split_flat(list(group.weights), sizes, start, master.numel()):
                views = (t.detach()[at : at + count] for t in (master, state["exp_avg"], state["exp_avg_sq"]))
                found.append(Fragment(name, within, *views))
        return found

    def steps_taken(self) -> int:
        self._base.materialise()
        return int(self._base.state[self._inner.fp32_groups_flat_partition[0]]["step"])

    def restore(self, steps_taken: int) -> None:
        self._base.materialise()
        for master in self._inner.fp32_groups_flat_partition:
            self._base.state[master]["step"] = steps_taken
        self._inner.update_lp_params()
