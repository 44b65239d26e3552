"""AdamW over flat FP32 master weights, with moments in FP32 or BF16 (V3 report section 3.3.3 keeps them in BF16).

m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w (1 - lr wd) - lr m^ / (sqrt(v^) + eps)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw as torchs_adamw

from deepseek_kernels.optim import adamw


class AdamW(Optimizer):
    """With FP32 moments this is torch's fused AdamW; torch has none whose moments are narrower than the weights, so
    with BF16 moments it is that of ``deepseek_kernels``, by ``backend``."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype = torch.float32,
        backend: str = "reference",
    ) -> None:
        self._moments, self._backend = moments, backend
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. Learning rates are read from ``param_groups``."""
        assert closure is None
        update = _fused if self._moments is torch.float32 else self._narrow
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    update(weight, weight.grad, self._state_of(weight), group)

    def _narrow(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state["step"] += 1
        (beta1, beta2), step = group["betas"], int(state["step"])
        adamw(
            weight,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            step,
            backend=self._backend,
        )

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            # torch's kernel reads it on its device; ours is told, so the device is never waited for
            where = weight.device if self._moments is torch.float32 else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg"] = torch.zeros_like(weight, dtype=self._moments)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=self._moments)
        return state

    def materialise(self) -> None:
        """Creates the state of every weight, so that a checkpoint can be loaded into it before the first step."""
        for group in self.param_groups:
            for weight in group["params"]:
                self._state_of(weight)


def _fused(weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    torchs_adamw(
        [weight],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
