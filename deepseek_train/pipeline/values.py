"""What a pass over a schedule starts from and what it brings about.

Legend: B sequences, T positions, D hidden, E experts.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deepseek_train.phases.phase import Row
from deepseek_train.phases.values import Ledger
from deepseek_train.spec.stages import StageSpec


class PipelineStage(Protocol):
    """What the executor asks of a stage: phases from a ``MicroBatch`` (first stage) or ``Hidden`` to ``Hidden``."""

    @property
    def spec(self) -> StageSpec: ...
    @property
    def phases(self) -> Row: ...


@dataclass(frozen=True)
class Boundary:
    """The tensor that passes between stages: one micro-batch of hidden states."""

    shape_BTD: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LossScales:
    """What each loss of one micro-batch counts in the gradient (its weight / micro-batches of the global batch)."""

    main: float
    mtp: float
    balance: float

    def gradients(self, ledger: Ledger) -> list[Tensor]:
        """Gradients of the ledger's losses, in field order."""
        losses = ((ledger.main, self.main), (ledger.mtp, self.mtp), (ledger.balance, self.balance))
        return [torch.full_like(loss, scale) for loss, scale in losses if loss is not None]


@dataclass
class Ran:
    """What a pass brought about on this rank. Losses are detached scalars in nats."""

    main: dict[int, Tensor] = field(default_factory=dict)  # by micro-batch, on the rank of its last stage
    mtp: dict[int, Tensor] = field(default_factory=dict)
    balance: list[Tensor] = field(default_factory=list)  # one for each (stage with experts, micro-batch)
    loads: dict[int, Tensor] = field(default_factory=dict)  # layer -> tokens per expert [E], summed

    def note(self, microbatch: int, ledger: Ledger) -> None:
        if ledger.main is not None:
            self.main[microbatch] = ledger.main.detach()
        if ledger.mtp is not None:
            self.mtp[microbatch] = ledger.mtp.detach()
        if ledger.balance is not None:
            self.balance.append(ledger.balance.detach())
        for load in ledger.loads:
            known = self.loads.get(load.layer)
            self.loads[load.layer] = load.tokens_E if known is None else known + load.tokens_E
