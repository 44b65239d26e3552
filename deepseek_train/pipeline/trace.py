"""When this rank did what: spans for a Timeline, from the executor's own clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepseek_train.schedule.action import Action
from deepseek_train.schedule.timeline import Span


class Trace:
    """Collects spans. On CUDA each span ends with a device synchronisation: trace single steps, not all."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self._device = rank, device
        self._origin = time.perf_counter()
        self.spans: list[Span] = []

    @contextmanager
    def span(self, action: Action, *, paired: bool) -> Iterator[None]:
        start = self._now()
        yield
        place = (action.stage, action.microbatch)
        self.spans.append(Span(self.rank, action.kind, *place, start, self._now(), paired))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._origin
