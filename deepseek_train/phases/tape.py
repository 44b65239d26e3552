"""A tape of detached segments: the forward of a chunk, phase by phase, that can be run backward phase by phase.

Each phase runs on detached copies of its inputs, so its autograd graph is its own. The backward pass walks the
segments from last to first, whenever the schedule says; nothing hooks into autograd and no thread is involved.
"""

from typing import Any

import torch
from torch import Tensor

from deepseek_train.phases.phase import Phase
from deepseek_train.phases.tree import differentiable, with_tensors


class Tape:
    """Records phases in forward order, gives their gradients in reverse. For one micro-batch in one stage."""

    def __init__(self) -> None:
        self._segments: list[tuple[Phase, list[Tensor], list[Tensor]]] = []
        self._gradients: list[Tensor | None] | None = None

    def run(self, phase: Phase, value: Any) -> Any:
        """Runs ``phase`` on ``value`` and records it. The result's tensors belong to the phase's own graph."""
        leaves = [t.detach().requires_grad_() for t in differentiable(value)]
        with torch.enable_grad():
            result = phase.run(with_tensors(value, iter(leaves)))
        self._segments.append((phase, leaves, differentiable(result)))
        return result

    def __len__(self) -> int:
        """Segments that have not run backward yet."""
        return len(self._segments)

    def seed(self, gradients: list[Tensor | None]) -> None:
        """Gradients of the last phase's differentiable outputs, in tree order. None: nothing flows from there."""
        self._gradients = gradients

    def backward(self) -> list[Tensor | None]:
        """Runs the last remaining segment backward; returns the gradients of its inputs (what flowed into the chunk,
        once the first segment has run). Weight gradients go wherever the segment's functions put them."""
        if self._gradients is None:
            raise RuntimeError("a tape runs backward only after seed()")
        _, leaves, outputs = self._segments.pop()
        pairs = [(o, g) for o, g in zip(outputs, self._gradients, strict=True) if g is not None]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        self._gradients = [leaf.grad for leaf in leaves]
        return self._gradients
