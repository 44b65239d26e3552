"""AdamW over FP32 master weights. The formula: ``deepseek_kernels.optim``.

It has what DeepSpeed asks of an optimizer (``param_groups``, ``state``, ``step``) and is no ``torch.optim.Optimizer``:
the first of those imports all of ``torch._dynamo``, two seconds of a rank's start.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels.choice import ON_CPU
from deepseek_kernels.optim import adamw


class AdamW:
    """Moments in FP32 or, as V3 keeps them, BF16. The count of steps is a number: the host never waits for it."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype = torch.float32,
        backend: str = ON_CPU.optim,
    ) -> None:
        self._moments, self._backend = moments, backend
        usual = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0}
        self.param_groups: list[dict[str, Any]] = [usual | group for group in groups]
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)  # of each weight, by identity

    @torch.no_grad()
    def step(self) -> None:
        """One update. Learning rates are read from ``param_groups``."""
        for group in self.param_groups:
            lr, (beta1, beta2), eps, decay = (group[n] for n in ("lr", "betas", "eps", "weight_decay"))
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self._state_of(weight)
                    state["step"] += 1
                    m, v, step = (state[name] for name in ("exp_avg", "exp_avg_sq", "step"))
                    grad, backend = weight.grad, self._backend
                    adamw(weight, grad, m, v, lr, beta1, beta2, eps, decay, step, backend=backend)

    def _state_of(self, weight: Tensor) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weight, dtype=self._moments)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=self._moments)
        return state

    def materialise(self) -> None:
        """Creates the state of every weight, so that a checkpoint can be loaded into it before the first step."""
        for group in self.param_groups:
            for weight in group["params"]:
                self._state_of(weight)
