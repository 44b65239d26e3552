"""Weight gradients as work that waits: the split of a backward pass into input gradients and weight gradients.

Every function that owns a weight (linear, norm, embedding) computes only its input gradient inside autograd and adds
the rest here as a closure. The executor decides when it runs: at once (a full backward), or later (zero bubble).
Weight gradients are accumulated into ``weight.main_grad``; ``weight.grad`` is never used.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

Work = Callable[[], None]


class Weight(nn.Parameter):
    """A trained tensor with its gradient accumulator ``main_grad`` (same shape, FP32 or wider), given by the optimizer
    room or by ``allocate_main_grads`` before the first backward."""

    main_grad: Tensor


def allocate_main_grads(weights: list[Weight], dtype: torch.dtype) -> None:
    """Gives every weight a zeroed accumulator of its own."""
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight, dtype=dtype, requires_grad=False)


class WeightGradQueue:
    """Work of backward passes, first in first out, in groups of one chunk each."""

    def __init__(self) -> None:
        self._open: list[Work] = []
        self._sealed: deque[list[Work]] = deque()

    def add(self, work: Work) -> None:
        self._open.append(work)

    def seal(self, works: list[Work]) -> None:
        """Keeps what one chunk has added, as one group for ``run_oldest``."""
        self._sealed.append(works)

    def take_open(self) -> list[Work]:
        """What has been added since it was last taken; the caller runs or seals it."""
        works, self._open = self._open, []
        return works

    def run_oldest(self) -> None:
        """Runs the group that has waited longest."""
        run_works(self._sealed.popleft())

    def __len__(self) -> int:
        """Groups that wait."""
        return len(self._sealed)


# Saved activations require gradients: without no_grad, main_grad would drag their graph along.
@torch.no_grad()
def run_works(works: list[Work]) -> None:
    """Weight gradients of one or more phases, in the order of their backward passes."""
    for work in works:
        work()
