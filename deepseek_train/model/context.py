"""What every module of a stage is built with: passed down, never global."""

from dataclasses import dataclass, field

import torch

from deepseek_kernels.choice import ON_CPU, Kernels
from deepseek_train.config.schema import ModelConfig
from deepseek_train.fp8.room import Fp8
from deepseek_train.parallel.expert.dispatcher import LOCAL, Dispatcher
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.wgrad import Weight, WeightGradQueue


@dataclass(frozen=True)
class ModelContext:
    """Architecture, where weight gradients wait, how tokens get to their experts, what weights are made of, which
    activations are not kept, whose kernels compute, and, in FP8 training, how."""

    model: ModelConfig
    queue: WeightGradQueue
    dispatcher: Dispatcher = LOCAL
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    recompute: Recomputation = field(default_factory=Recomputation)
    kernels: Kernels = ON_CPU
    fp8: Fp8 | None = None
    compiled: bool = False  # glue by torch.compile

    def weight(self, *shape: int) -> Weight:
        """An uninitialised weight; ``init`` fills it."""
        return Weight(torch.empty(shape, device=self.device, dtype=self.dtype))
