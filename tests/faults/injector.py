"""``deepseek-train`` with faults. ``FAULTS="kill forward 1 3; stop save 0 4"``: rank 1 kills itself in the forward pass
of step 3, once, so not again when it comes back to that step, and so on; see ``STRIKES`` and ``PLACES``. ``SLOW=r``:
the experts of rank r take their time. ``ODD=r``: rank r has other code.
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


def ask() -> None:
    """Slurm's warning, to one rank alone."""
    os.kill(os.getpid(), signal.SIGUSR1)


STRIKES = {strike.__name__: strike for strike in (kill, stop, hog, sleep, ask)}
PLACES = {"forward": (step, "on_device"), "optimizer": (Zero1, "reduce"), "save": (saving.Saving, "begin")}


class Faults:
    """The faults of one rank."""

    def __init__(self, words: list[list[str]]) -> None:
        self._step = 0
        before(loop, "train_step", self._note)
        for what, where, _, number in words:
            before(*PLACES[where], lambda *_, w=what, p=where, n=number: self._perhaps(w, p, int(n)))

    def _note(self, _job: Any, progress: Any, **_: Any) -> None:
        self._step = progress.step + 1

    def _perhaps(self, what: str, where: str, number: int) -> None:
        mark = Path(f"struck-{what}-{where}-{number}")
        if self._step == number and not mark.exists():
            mark.touch()
            STRIKES[what]()


def before(owner: Any, name: str, do: Callable[..., None]) -> None:
    """From now on ``do`` comes first, in this process."""
    then = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        do(*args, **kwargs)
        return then(*args, **kwargs)

    setattr(owner, name, both)


def rank_main(argv: list[str]) -> int:
    """In place of ``cli.train_rank``'s own, in every rank."""
    rank = os.environ["RANK"]
    words = [fault.split() for fault in os.environ.get("FAULTS", "").split(";") if fault]
    Faults([fault for fault in words if fault[2] == rank])
    if rank == os.environ.get("SLOW"):
        before(MoeBlock, "compute", lambda *_: time.sleep(0.05))
    if rank == os.environ.get("ODD"):
        setattr(agreement, "_code", lambda: "yesterdays")  # noqa: B010
    return train_rank.rank_main(argv)


if __name__ == "__main__":
    train.RANK = "tests.faults.injector"
    sys.exit(train.run(sys.argv[1:]))
