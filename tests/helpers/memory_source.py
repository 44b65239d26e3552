"""A model's tensors in memory, as if they were stored."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.stage import Stage
from deepseek_train.spec.published import Published
from tests.helpers.models import table_tensors


@dataclass(frozen=True)
class MemorySource:
    """A ``WeightSource``."""

    model: ModelConfig
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def piece(self, published: Published) -> Tensor:
        flat = self.tensors[published.weight.name].flatten()
        return flat[published.start : published.start + published.size].view(published.shape)

    @staticmethod
    def of(stage: Stage) -> "MemorySource":
        return MemorySource(stage.context.model, table_tensors(stage))
