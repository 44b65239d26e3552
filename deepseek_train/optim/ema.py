"""Exponential moving average of the weights, in CPU memory, behind the training (V3 report section 3.2.3): an early
estimate of what the model will be once the learning rate has decayed.

Each rank averages the FP32 masters it is responsible for, so the job holds each average once. After an optimizer step
they are copied to the host (on a GPU by a stream of its own, into pinned memory); a thread then moves the averages
while the next step runs. The thread does nothing but arithmetic, and its result does not depend on when it runs.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_train.optim.groups import Fragment


@dataclass(frozen=True)
class Average:
    """Elements [start, start + len(tensor)) of one flattened local weight's average, FP32 in CPU memory. A view."""

    name: str
    start: int
    tensor: Tensor


class Ema:
    """average += (1 - decay) * (master - average) after each step; at first a plain mean of the steps so far, which
    holds nothing of the initial weights. ``fragments``: the optimizer's, whose masters are read whenever it is called.
    """

    def __init__(self, fragments: list[Fragment], decay: float) -> None:
        self._masters = [fragment.master.detach() for fragment in fragments]
        self._decay = decay
        on_gpu = bool(fragments) and fragments[0].master.is_cuda
        self._side = torch.cuda.Stream(fragments[0].master.device) if on_gpu else None
        self._copied: torch.cuda.Event | None = None
        self._staged = [torch.empty(len(m), dtype=torch.float32, pin_memory=on_gpu) for m in self._masters]
        self._averages = [
            Average(fragment.name, fragment.start, torch.empty(len(fragment.master), dtype=torch.float32))
            for fragment in fragments
        ]
        self._thread = ThreadPoolExecutor(1, "ema")
        self._moving: Future[None] | None = None
        self.restart()

    def restart(self) -> None:
        """The averages are the masters as they stand: at the start, and after a checkpoint that holds no averages."""
        self.wait()
        for average, master in zip(self._averages, self._masters, strict=True):
            average.tensor.copy_(master)

    def update(self, steps_taken: int) -> None:
        """After the ``steps_taken``-th optimizer step: takes the masters, and averages them behind what follows."""
        self.wait()
        if self._side is None:
            for staged, master in zip(self._staged, self._masters, strict=True):
                staged.copy_(master)
        else:
            self._side.wait_stream(torch.cuda.current_stream(self._side.device))
            with torch.cuda.stream(self._side):
                for staged, master in zip(self._staged, self._masters, strict=True):
                    staged.copy_(master, non_blocking=True)
                self._copied = self._side.record_event()
        share = max(1.0 - self._decay, 1.0 / steps_taken)
        self._moving = self._thread.submit(self._move, share, self._copied)

    @torch.no_grad()
    def _move(self, share: float, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for average, staged in zip(self._averages, self._staged, strict=True):
            average.tensor.lerp_(staged, share)

    def release_masters(self) -> None:
        """To be called before masters change: on a GPU their copy may be under way, and what follows waits for it."""
        if self._copied is not None:
            torch.cuda.current_stream(self._masters[0].device).wait_event(self._copied)

    def wait(self) -> None:
        """Until the averages stand still. Raises what the thread raised."""
        if self._moving is not None:
            self._moving.result()
            self._moving = None

    def averages(self) -> list[Average]:
        """All that this rank holds, standing still until the next ``update``. Writing to them changes the averages."""
        self.wait()
        return self._averages

    @contextmanager
    def in_masters(self) -> Iterator[None]:
        """Inside ``with`` the masters hold the averages, afterwards bitwise what they held before; publishing them to
        the weights, both times, is the caller's. Nothing is put back after an exception."""
        self.wait()
        for staged, master, average in zip(self._staged, self._masters, self._averages, strict=True):
            staged.copy_(master)
            master.copy_(average.tensor)
        yield
        for staged, master in zip(self._staged, self._masters, strict=True):
            master.copy_(staged)
