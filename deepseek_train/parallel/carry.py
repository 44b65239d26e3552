"""Transfers of several legs, with a little computing between them, that need nobody to push them on.

A transfer is a generator: it starts a collective, yields its work, and is resumed when that is over; what it returns
has arrived. On CPUs the network's own thread resumes it; on CUDA a stream of its own does, and the host never waits.
"""

from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from deepseek_train.phases.parcel import Pending, Tensors
from deepseek_train.watch.whereabouts import Whereabouts

Transfer = Generator[dist.Work, None, Tensors]


class TransferLost(RuntimeError):
    """A rank that takes part in a transfer has failed or does not come; the message says which transfer. On CUDA the
    watchdog of NCCL finds it, and knows no names."""


def carry(
    what: str,
    transfer: Transfer,
    tensors: Tensors,
    stream: torch.cuda.Stream | None,
    where: Whereabouts,
) -> Pending:
    """Starts ``transfer``; ``what`` it is, for errors and for ``where``. ``tensors``: all that it reads. ``stream``:
    where its legs are queued; None on CPUs."""
    where.started(what)
    return ByNetwork(what, transfer, where) if stream is None else OnStream(transfer, tensors, stream)


class ByNetwork:
    """Every leg begins in the thread that ended the one before."""

    def __init__(self, what: str, transfer: Transfer, where: Whereabouts) -> None:
        self._what, self._transfer, self._where = what, transfer, where
        self._over: Future[Tensors] = Future()
        self._go_on(None)

    def _go_on(self, last: Any) -> None:
        try:
            if last is not None:
                last.value()  # raises what went wrong in that leg
            next(self._transfer).get_future().add_done_callback(self._go_on)
        except StopIteration as end:
            self._over.set_result(end.value)
        except RuntimeError as error:  # all that gloo raises, when a leg ends and when one starts
            self._fail(TransferLost(f"{self._what}: {error}"))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._over.set_exception(error)  # type: ignore[arg-type]  # its stub names the wrong type

    def wait(self) -> Tensors:
        if not self._over.done():
            self._where.waits(self._what)
        arrived = self._over.wait()
        self._where.goes_on()
        return arrived

    def ready(self) -> bool:
        return self._over.done()

    def when_done(self, note: Callable[[], None]) -> None:
        self._over.add_done_callback(lambda _: note())


class OnStream:
    """All legs are queued at once on ``stream``, behind what the current stream has been given so far."""

    def __init__(self, transfer: Transfer, tensors: Tensors, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        for tensor in tensors:
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            self._arrived = _queued(transfer)
            self._end = stream.record_event()

    def wait(self) -> Tensors:
        current = torch.cuda.current_stream()
        current.wait_event(self._end)
        for tensor in self._arrived:
            tensor.record_stream(current)
        return self._arrived

    def ready(self) -> bool:
        return bool(self._end.query())

    def when_done(self, note: Callable[[], None]) -> None:
        raise TypeError("the end of a transfer on CUDA is an event, not a call: trace with a DeviceClock")


def _queued(transfer: Transfer) -> Tensors:
    while True:
        try:
            work = next(transfer)
        except StopIteration as end:
            arrived: Tensors = end.value
            return arrived
        work.wait()  # holds back the stream, not the host
