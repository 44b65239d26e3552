"""A model as its published tensors: the table of weights, cut into what lies in a Hugging Face folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.weights import WeightSpec, all_weights


@dataclass(frozen=True)
class Published:
    """One published tensor: ``prod(shape)`` consecutive elements of a weight, flattened, from ``start`` on."""

    name: str
    weight: WeightSpec
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


def pieces(weight: WeightSpec) -> Iterator[Published]:
    """What ``weight`` is published as. One after the other, flattened, they are the weight."""
    if not weight.expert:
        yield from _cut(weight, weight.shape, 0, None)
        return
    experts, *shape = weight.shape
    for expert in range(experts):
        yield from _cut(weight, tuple(shape), expert * prod(shape), expert)


def _cut(weight: WeightSpec, shape: tuple[int, ...], start: int, expert: int | None) -> Iterator[Published]:
    rows, *row = shape
    for part in weight.hf:
        name = part.name if expert is None else part.name.format(expert=expert)
        yield Published(name, weight, start + part.start * prod(row), (part.stop - part.start, *row))


def copies(weight: WeightSpec) -> Iterator[Published]:
    """The weight once more, whole, for each MTP module that shares it."""
    for name in weight.copies:
        yield Published(name, weight, 0, weight.shape)


def all_published(m: ModelConfig) -> Iterator[Published]:
    """Everything that is published of a model, copies included, weights in the table's order."""
    for weight in all_weights(m):
        yield from pieces(weight)
        yield from copies(weight)
