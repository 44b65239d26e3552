"""Which steps are not taken: losses or gradients that are not finite, and spikes. Every rank holds the same numbers of
a step, bit for bit, and this is arithmetic on them: all ranks come to the same verdict without asking one another.

A spike is told from running means over accepted steps alone, so that it does not raise what it is measured by.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepseek_train.config.guard import GuardConfig


class GuardError(RuntimeError):
    """The guard gives the run up: what was refused, where in the data, what to do. The same on every rank."""


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers; part of a checkpoint. Its floats survive JSON bit for bit: Python writes the shortest
    decimal that reads back as the same double."""

    accepted: int = 0  # steps
    loss: float = 0.0  # running means over accepted steps
    grad_norm: float = 0.0
    skipped: int = 0  # steps of the run, all together
    in_a_row: int = 0  # skipped since the last accepted one
    # The row of skipped steps: the last step before it, and how many sequences had been consumed by then.
    row_after_step: int = 0
    row_start: int = 0

    def objection(self, guard: GuardConfig, losses: tuple[float, ...], norm: float) -> str | None:
        """Why a step must not be taken. ``losses``: of the step, the one that is watched for spikes first."""
        if not all(map(math.isfinite, losses)):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "a gradient is not finite"
        if self.accepted < guard.mean_steps:
            return None
        for what, value, mean, factor in (
            ("loss", losses[0], self.loss, guard.loss_factor),
            ("gradient norm", norm, self.grad_norm, guard.norm_factor),
        ):
            if factor > 0.0 and value > factor * mean:
                return f"{what} {value:.4g} is more than {factor:g} times its running mean {mean:.4g}"
        return None

    def after_accepted(self, guard: GuardConfig, loss: float, norm: float) -> "GuardState":
        accepted = self.accepted + 1
        share = max(1.0 / guard.mean_steps, 1.0 / accepted)  # a plain mean at first
        return replace(
            self,
            accepted=accepted,
            loss=self.loss + share * (loss - self.loss),
            grad_norm=self.grad_norm + share * (norm - self.grad_norm),
            in_a_row=0,
        )

    def after_skipped(self, step: int, consumed: int) -> "GuardState":
        """``step``, ``consumed``: the last step and the consumed sequences before the skipped one."""
        row = {} if self.in_a_row else {"row_after_step": step, "row_start": consumed}
        return replace(self, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1, **row)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "GuardState":
        return GuardState(**values)
