"""Activations that are not kept: what a region computed is forgotten after the forward pass and computed once more
when the backward pass asks for it.

A region is a function whose results later functions save for their backward. In their place a recipe is saved: the
region and its inputs, themselves recipes where they come out of regions. Only values are computed anew: the autograd
graph is that of the forward pass. Weight-gradient closures hold what the backward pass was given, so a split backward
(zero bubble) costs one recomputation as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

from deepseek_train.config.schema import Forgettable
from deepseek_train.phases.phase import Move, Phase, Row

Made = TypeVar("Made", Tensor, tuple[Tensor, ...])


class Recomputation:
    """Which kinds of activations the phases of a stage forget."""

    def __init__(self, kinds: frozenset[Forgettable] = frozenset()) -> None:
        self.kinds = kinds
        self._products: WeakKeyDictionary[UntypedStorage, _Product] = WeakKeyDictionary()

    @property
    def of_blocks(self) -> bool:
        """Whether ``Phase.recompute`` holds for the phases of blocks."""
        return "block" in self.kinds

    def region(self, kind: Forgettable, run: Callable[..., Made], *inputs: Tensor) -> Made:
        """``run(*inputs)``, a pure function of its inputs and of weights: of what it returns, functions in phases of
        ``row`` save the recipe if this ``kind`` is forgotten."""
        outputs = run(*inputs)
        if kind in self.kinds and torch.is_grad_enabled():
            self._remember(run, inputs, outputs if isinstance(outputs, tuple) else (outputs,))
        return outputs

    def derived(self, run: Callable[..., Made], *inputs: Tensor) -> Made:
        """``run(*inputs)``, as pure, and forgotten where an input is: what can be made of it again need not be kept."""
        outputs = run(*inputs)
        if torch.is_grad_enabled() and any(self._product(tensor) for tensor in inputs):
            self._remember(run, inputs, outputs if isinstance(outputs, tuple) else (outputs,))
        return outputs

    def row(self, row: Row) -> Row:
        """The phases, forgetting; those that are recomputed as a whole have nothing left to forget."""
        if not self.kinds - {"block"}:
            return row
        return tuple(self._phase(one) if isinstance(one, Phase) else self._move(one) for one in row)

    def _phase(self, phase: Phase) -> Phase:
        return phase if phase.recompute else replace(phase, run=self._forgetting(phase.run))

    def _move(self, move: Move) -> Move:
        return replace(move, beside=self._phase(move.beside)) if move.beside else move

    def _forgetting(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @wraps(run)
        def forgetting(value: Any) -> Any:
            with saved_tensors_hooks(self._pack, _unpack):
                return run(value)

        return forgetting

    def _remember(
        self, run: Callable[..., Any], inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
    ) -> None:
        given = [tensor.untyped_storage() for tensor in inputs]
        # A view of an input is no product: its recipe would keep the memory that it is to free.
        made = {
            index: output
            for index, output in enumerate(outputs)
            if output.untyped_storage() not in self._products
            and not any(output.untyped_storage() is one for one in given)
        }
        if not made:
            return
        recipe = _Recipe(run, [self._pack(tensor.detach()) for tensor in inputs])
        for index, output in made.items():
            self._products[output.untyped_storage()] = _Product(recipe, index, output.dtype, output._version)

    def _product(self, tensor: Tensor) -> "_Product | None":
        """What ``tensor`` is a view of, if that can be made again."""
        found = self._products.get(tensor.untyped_storage())
        same = found is not None and (found.dtype, found.version) == (tensor.dtype, tensor._version)
        return found if same else None

    def _pack(self, tensor: Tensor) -> "Tensor | _Forgotten":
        product = self._product(tensor)
        if product is None:
            return tensor.detach()  # not itself: an output that its own node held would never be freed
        product.recipe.users += 1
        return _Forgotten(product, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


@dataclass(frozen=True)
class _Product:
    """Memory that a region filled. Written to since (another ``version``), it is what the recipe cannot give."""

    recipe: "_Recipe"
    index: int
    dtype: torch.dtype
    version: int


@dataclass(frozen=True)
class _Forgotten:
    """A view of a product."""

    product: _Product
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def value(self) -> Tensor:
        product = self.product
        return product.recipe.output(product.index).as_strided(self.size, self.stride, self.offset)


class _Recipe:
    """Runs when its first user asks, and keeps the outputs until its last one has asked."""

    def __init__(self, run: Callable[..., Any], inputs: "list[Tensor | _Forgotten]") -> None:
        self.users = 0
        self._run, self._inputs = run, inputs
        self._outputs: tuple[Tensor, ...] | None = None

    @torch.no_grad()
    def output(self, index: int) -> Tensor:
        outputs = self._outputs
        if outputs is None:
            made = self._run(*[_unpack(one) for one in self._inputs])
            outputs = made if isinstance(made, tuple) else (made,)
        self.users -= 1
        self._outputs = outputs if self.users > 0 else None
        return outputs[index]


def _unpack(saved: "Tensor | _Forgotten") -> Tensor:
    return saved.value() if isinstance(saved, _Forgotten) else saved
