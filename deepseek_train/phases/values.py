"""What enters a pipeline stage, and what leaves it.

Legend: B sequences, T positions, D hidden, E experts, M MTP modules.
"""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Token ids [B, T + 1 + M], int64: position i predicts i + 1, MTP module k predicts i + k + 2."""

    tokens: Tensor


@dataclass(frozen=True)
class LayerLoad:
    """Tokens each routed expert of one layer got from this micro-batch; layer num_layers + k is MTP module k."""

    layer: int
    tokens_E: Tensor


@dataclass(frozen=True)
class Ledger:
    """What a micro-batch has brought about in this stage besides hidden states. Losses are scalars in nats."""

    main: Tensor | None = None  # next-token cross-entropy, mean over positions
    mtp: Tensor | None = None  # mean over modules of their mean cross-entropy
    balance: Tensor | None = None  # sequence-wise balance loss, summed over layers, mean over sequences
    loads: tuple[LayerLoad, ...] = ()


@dataclass(frozen=True)
class Hidden:
    """The residual stream between blocks. ``batch`` is there in the stages that embed or have a head."""

    x_BTD: Tensor
    batch: MicroBatch | None = None
    ledger: Ledger = Ledger()

    def moved_to(self, x_BTD: Tensor) -> "Hidden":
        return replace(self, x_BTD=x_BTD)
