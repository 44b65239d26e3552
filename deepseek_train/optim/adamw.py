"""AdamW over FP32 master weights as an optimizer of torch's kind. The formula: ``deepseek_kernels.optim``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepseek_kernels.choice import ON_CPU
from deepseek_kernels.optim import adamw


class AdamW(Optimizer):
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
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. Learning rates are read from ``param_groups``."""
        assert closure is None
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
