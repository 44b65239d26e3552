"""Weights by their names in our table, wherever they lie: in a checkpoint of ours, or in a Hugging Face folder."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from deepseek_train.checkpoint.errors import CheckpointError, NoCheckpoint
from deepseek_train.checkpoint.hf_config import CONFIG
from deepseek_train.checkpoint.hf_folder import HfFolder
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.stored import StoredCheckpoint, newest_whole
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


class CheckpointWeights:
    """FP32 weights of a checkpoint of ours: ``kind`` is "master", or "ema" for their running averages."""

    def __init__(self, stored: StoredCheckpoint, kind: str = "master") -> None:
        """Raises CheckpointError if it does not say which model it holds, or lacks one of its weights."""
        try:
            self.model = parse(ModelConfig, stored.facts["model"])
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"{stored.path} does not say which model it holds: {error}") from error
        self.path, self.facts = stored.path, stored.facts
        self._stored = stored
        self._names = checkpoint_names(self.model, kind)
        self._shapes = {weight.name: weight.shape for weight in all_weights(self.model)}
        wrong = [
            name
            for weight in all_weights(self.model)
            if (name := self._names[weight.name]) not in stored.tensors
            or stored.tensors[name].total != weight.size
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{stored.path} lacks {', '.join(wrong[:3])}{more}, or has them in another size than its model's"
            )

    def read(self, name: str) -> Tensor:
        """See ``WeightSource``."""
        return self._stored.read(self._names[name]).view(self._shapes[name])

    def piece(self, published: Published) -> Tensor:
        """See ``WeightSource``."""
        name = self._names[published.weight.name]
        return self._stored.read(name, published.start, published.size).view(published.shape)


def checkpoint_names(m: ModelConfig, kind: str = "master") -> dict[str, str]:
    """What a checkpoint calls each weight of the table. Router biases go by the number of their layer, MTP modules
    counted on after the last."""
    moe = {f"layers.{layer}": layer for layer in range(m.num_dense_layers, m.num_layers)}
    moe |= {f"mtp.{depth}.block": m.num_layers + depth for depth in range(m.mtp_depth)}
    biases = {f"{block}.router.bias": f"router_bias/{layer}" for block, layer in moe.items()}
    return {w.name: biases.get(w.name, f"{kind}/{w.name}") for w in all_weights(m)}


def open_weights(path: Place, kind: str = "master") -> WeightSource:
    """The weights in a local Hugging Face folder, in a checkpoint, or in the newest whole one of a run.
    ``kind``: see ``CheckpointWeights``.

    Raises CheckpointError: there are none, or something is wrong with them.
    """
    if isinstance(path, Path) and (path / CONFIG).is_file():
        if kind != "master":
            raise CheckpointError(
                f"{path} is a Hugging Face folder: it has one kind of weights, not {kind!r}"
            )
        return HfFolder.open(path)
    try:
        return CheckpointWeights(newest_whole(path), kind)
    except NoCheckpoint as error:
        raise NoCheckpoint(f"{error}; nor a {CONFIG}, as Hugging Face folders have") from error
