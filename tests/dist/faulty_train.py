"""``deepseek-train`` with one fault in one rank: ``FAULT="kill forward 1 3" python -m tests.dist.faulty_train ...`` has
rank 1 kill itself in the forward pass of step 3, once: not again when it is started again. ``ODD=r`` gives rank r other
code. What can be done: ``FAULTS``; where: forward, optimizer, save.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_train.cli import train, train_rank
from deepseek_train.model.block import MoeBlock
from deepseek_train.optim.zero1 import Zero1
from deepseek_train.train import agreement, loop, saving, step


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hog() -> None:
    """Holds Python's lock, in C, for ages."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def sleep() -> None:
    time.sleep(600)


def slow() -> None:
    """From now on every computation of experts takes longer."""
    compute = MoeBlock.compute

    def slowly(block: MoeBlock, sent: Any) -> Any:
        time.sleep(0.1)
        return compute(block, sent)

    setattr(MoeBlock, "compute", slowly)  # noqa: B010  (in this process alone)


def ask() -> None:
    """Slurm's warning, to one rank alone."""
    os.kill(os.getpid(), signal.SIGUSR1)


FAULTS = {f.__name__: f for f in (kill, stop, hog, sleep, slow, ask)}
PLACES = {"forward": (step, "on_device"), "optimizer": (Zero1, "reduce"), "save": (saving.Saving, "begin")}


class Fault:
    """Strikes where and when it is told to."""

    def __init__(self, what: str, where: str, number: int) -> None:
        self._strike, self._number, self._step = FAULTS[what], number, 0
        self._mark = Path(f"struck-{what}-{where}-{number}")
        owner, name = PLACES[where]
        self._before(loop, "train_step", self._count)
        self._before(owner, name, self._perhaps)

    def _before(self, owner: Any, name: str, do: Callable[[], None]) -> None:
        then = getattr(owner, name)

        def both(*args: Any, **kwargs: Any) -> Any:
            do()
            return then(*args, **kwargs)

        setattr(owner, name, both)

    def _count(self) -> None:
        self._step += 1

    def _perhaps(self) -> None:
        if self._step == self._number and not self._mark.exists():
            self._mark.touch()
            self._strike()


def rank_main(argv: list[str]) -> int:
    """In place of ``cli.train_rank``'s own, in every rank."""
    what, where, rank, number = os.environ.get("FAULT", "kill forward -1 0").split()
    if os.environ["RANK"] == rank:
        Fault(what, where, int(number))
    if os.environ["RANK"] == os.environ.get("ODD"):
        setattr(agreement, "_code", lambda: "yesterdays")  # noqa: B010
    return train_rank.rank_main(argv)


if __name__ == "__main__":
    train.RANK = "tests.dist.faulty_train"
    sys.exit(train.run(sys.argv[1:]))
