"""Weights by their names in our table, wherever they lie: in a checkpoint of ours, or in a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from deepseek_train.checkpoint.agree import CheckpointError
from deepseek_train.checkpoint.hf_folder import CONFIG, HfFolder
from deepseek_train.config.parse import ConfigError, parse
from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.published import Published
from deepseek_train.spec.weights import all_weights


class WeightSource(Protocol):
    """Weights and router biases, one at a time."""

    @property
    def model(self) -> ModelConfig: ...

    def read(self, name: str) -> Tensor:
        """The weight called ``name`` in ``spec.weights`` ("layers.3.router.bias" too), all experts, shaped as there,
        on the CPU, in the type in which it is stored."""
        ...

    def piece(self, published: Published) -> Tensor:
        """The same for what is published as one tensor, an expert's for instance: nothing else is read."""
        ...


class Stored(Protocol):
    """What is needed of a ``StoredCheckpoint``."""

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor: ...


class CheckpointWeights:
    """FP32 weights of a checkpoint of ours: ``kind`` is "master", or "ema" for their running averages."""

    def __init__(self, stored: Stored, kind: str = "master") -> None:
        """Raises CheckpointError if it does not say which model it holds, or lacks one of its weights."""
        try:
            self.model = parse(ModelConfig, stored.facts["model"])
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"the checkpoint does not say which model it holds: {error}") from error
        self._stored = stored
        self._shapes = {weight.name: weight.shape for weight in all_weights(self.model)}
        self._names = {**{w: f"{kind}/{w}" for w in self._shapes}, **_bias_names(self.model)}
        missing = [name for name in self._names.values() if name not in stored.tensors]
        if missing:
            more = f", and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(f"the checkpoint does not hold {', '.join(missing[:3])}{more}")

    def read(self, name: str) -> Tensor:
        """See ``WeightSource``."""
        return self._stored.read(self._names[name]).view(self._shapes[name])

    def piece(self, published: Published) -> Tensor:
        """See ``WeightSource``."""
        name = self._names[published.weight.name]
        return self._stored.read(name, published.start, published.size).view(published.shape)


def _bias_names(m: ModelConfig) -> dict[str, str]:
    """Checkpoints call router biases by the number of their layer, MTP modules counted on after the last."""
    moe = {f"layers.{layer}": layer for layer in range(m.num_dense_layers, m.num_layers)}
    moe |= {f"mtp.{depth}.block": m.num_layers + depth for depth in range(m.mtp_depth)}
    return {f"{name}.router.bias": f"router_bias/{layer}" for name, layer in moe.items()}


def open_weights(path: Path) -> WeightSource:
    """The weights in a Hugging Face folder.

    Raises CheckpointError: there is none, or something is wrong with it (``HfFolder.open``).
    """
    if (path / CONFIG).is_file():
        return HfFolder.open(path)
    raise CheckpointError(f"{path} is no Hugging Face folder: it has no {CONFIG}")
