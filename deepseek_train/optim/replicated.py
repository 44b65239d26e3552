"""The plain twin of ZeRO-1: all-reduced gradients, whole FP32 state on every rank. Needs neither DeepSpeed nor, with a
single rank, a process group. The reference that ``zero1`` is tested against, and what one-process benchmarks use.
"""

import math

import torch
import torch.distributed as dist

from deepseek_kernels.choice import ON_CPU
from deepseek_train.config.schema import OptimConfig
from deepseek_train.optim.adamw import AdamW
from deepseek_train.optim.groups import Fragment, Objection, StepOutcome, WeightGroup, no_objection, refusal


class Replicated:
    """A ``DistributedOptimizer`` that shards nothing. ``world`` None: one rank, no communication."""

    def __init__(
        self,
        groups: list[WeightGroup],
        world: dist.ProcessGroup | None,
        config: OptimConfig,
        moments: torch.dtype,
        backend: str = ON_CPU.optim,
    ) -> None:
        self._groups, self._world, self._clip = groups, world, config.clip_norm
        self._weights = {name: weight for group in groups for name, weight in group.weights.items()}
        self._masters = {name: w.detach().to(torch.float32, copy=True) for name, w in self._weights.items()}
        for weight in self._weights.values():
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        self._base = AdamW(
            [
                {"params": [self._masters[name] for name in g.weights], "weight_decay": g.weight_decay}
                for g in groups
            ],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            moments=moments,
            backend=backend,
        )

    def reduce(self) -> None:
        for group in self._groups:
            if group.replicas is not None:
                for weight in group.weights.values():
                    dist.all_reduce(weight.main_grad, group=group.replicas)

    @torch.no_grad()
    def step(self, lr: float, objection: Objection = no_objection) -> StepOutcome:
        norm = float(self._squared_norm().sqrt())
        norm = norm if math.isfinite(norm) else math.inf
        refused = refusal(norm, objection)
        if refused is None:
            scale = min(1.0, self._clip / (norm + 1e-6)) if self._clip > 0 else 1.0
            for name, weight in self._weights.items():
                self._masters[name].grad = weight.main_grad.mul_(scale) if scale < 1.0 else weight.main_grad
            for param_group in self._base.param_groups:
                param_group["lr"] = lr
            self._base.step()
            self._publish()
        for weight in self._weights.values():
            weight.main_grad.zero_()
        return StepOutcome(norm, refused)

    def _squared_norm(self) -> torch.Tensor:
        """Over all weights of the job: each replica counts its share of a sum that all of them hold."""
        shares = []
        for group in self._groups:
            copies = 1 if group.replicas is None else dist.get_world_size(group.replicas)
            for weight in group.weights.values():
                shares.append(torch.linalg.vector_norm(weight.main_grad).square() / copies)
        total = torch.stack(shares).sum().cpu()  # the device is waited for once
        if self._world is not None:
            dist.all_reduce(total, group=self._world)
        return total

    def _publish(self) -> None:
        for name, weight in self._weights.items():
            weight.data.copy_(self._masters[name])

    def fragments(self) -> list[Fragment]:
        self._base.materialise()
        return [
            Fragment(
                name, 0, m.flatten(), *(self._base.state[m][k].flatten() for k in ("exp_avg", "exp_avg_sq"))
            )
            for name, m in self._masters.items()
        ]

    def steps_taken(self) -> int:
        self._base.materialise()
        return int(next(iter(self._base.state.values()))["step"])

    def restore(self, steps_taken: int) -> None:
        self._base.materialise()
        for state in self._base.state.values():
            state["step"] = steps_taken
        self._publish()
