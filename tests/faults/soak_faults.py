"""The ranks of ``deepseek-train`` in a soak: the faults of ``FAULTS`` ("kill forward 1 7; cut optimizer 0 12; ...",
numbered in this order), each once, at its step or when its rank next comes to that place.

Leaves ``struck-N`` with the moment in which fault N struck, and ``steps``: every step that was done, with its moment.
Moments are seconds on the system's monotonic clock, which all processes share.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from deepseek_train.checkpoint import folders, saver
from deepseek_train.checkpoint.manifest import NAME
from deepseek_train.cli import train_rank
from deepseek_train.monitor.metrics import StepMetrics
from deepseek_train.monitor.sinks import Monitor
from deepseek_train.optim.zero1 import Zero1
from deepseek_train.train import begin, loop
from tests.faults import injector
from tests.faults.injector import before
from tests.faults.strikes import ask, hog, kill, sleep, stop

STEPS = Path("steps")
CHECKPOINTS = Path("runs/soaked/checkpoints")


def term(_job: object) -> None:
    os.kill(_launcher(), signal.SIGTERM)


def orphan(_job: object) -> None:
    os.kill(_launcher(), signal.SIGKILL)


def outage(_job: object) -> None:
    """The launcher, the server it forks from and all ranks: whoever started them gave them a group of their own."""
    os.killpg(0, signal.SIGKILL)


def flip(_job: object) -> None:
    path = _newest_file()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    kill(None)


def cut(_job: object) -> None:
    path = _newest_file()
    os.truncate(path, path.stat().st_size - 8)
    kill(None)


def behead(_job: object) -> None:
    (folders.committed(CHECKPOINTS)[0].path / NAME).unlink()
    kill(None)


DAMAGE = (flip, cut, behead)
STRIKES: dict[str, Callable[[object], None]] = {
    strike.__name__: strike for strike in (kill, stop, sleep, hog, ask, term, orphan, outage, *DAMAGE)
}
PLACES = injector.PLACES | {
    "update": (Zero1, "step"),
    "agreement": (loop, "any_rank"),
    "commit": (saver, "commit"),
    "committed": (folders, "fsync_folder"),
    "loading": (begin, "load_checkpoint"),
}


class Faults:
    """Those of one rank, posted at their places. ``reached``: the last step the run has ever done."""

    def __init__(self, words: list[tuple[int, list[str]]], reached: int) -> None:
        self._step = reached
        before(loop, "train_step", self._note)
        for number, (what, where, _, step) in words:
            if where == "writing":
                self._within_file(number, what, int(step))
            else:
                before(*PLACES[where], lambda *_, n=number, w=what, s=int(step): self._perhaps(n, w, s))

    def _note(self, _job: Any, progress: Any, **_: Any) -> None:
        self._step = progress.step + 1

    def _within_file(self, number: int, what: str, step: int) -> None:
        write = saver.write_tensor_file

        def interrupted(tensors: list[Tensor]) -> Iterator[Tensor]:
            yield from tensors[: len(tensors) // 2]
            self._perhaps(number, what, step)
            yield from tensors[len(tensors) // 2 :]

        def both(path: Any, layout: Any, tensors: Iterable[Tensor]) -> Any:
            return write(path, layout, interrupted(list(tensors)))

        setattr(saver, "write_tensor_file", both)  # noqa: B010

    def _perhaps(self, number: int, what: str, step: int) -> None:
        mark, strike = Path(f"struck-{number}"), STRIKES[what]
        if self._step < step or mark.exists():
            return
        if strike in DAMAGE and len(folders.committed(CHECKPOINTS)) < 2:
            return  # nobody can be asked to go on without any
        mark.write_text(str(time.monotonic()))
        strike(None)


def rank_main(argv: list[str]) -> int:
    """In place of ``cli.train_rank``'s own, in every rank."""
    words = [word.split() for word in os.environ["FAULTS"].split(";") if word]
    done = STEPS.read_text().split() if STEPS.exists() else []
    mine = [(number, word) for number, word in enumerate(words) if word[2] == os.environ["RANK"]]
    Faults(mine, max(map(int, done[::2]), default=0))
    if os.environ["RANK"] == "0":
        before(Monitor, "step", _record)
    return train_rank.rank_main(argv)


def _record(_monitor: Monitor, metrics: StepMetrics) -> None:
    with STEPS.open("a") as file:
        file.write(f"{metrics.step} {time.monotonic()}\n")


def _launcher() -> int:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    assert launcher.pid is not None
    return launcher.pid


def _newest_file() -> Path:
    return next(iter(sorted(Path(folders.committed(CHECKPOINTS)[0].path).glob("*.safetensors"))))
