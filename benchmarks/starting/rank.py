"""A rank that leaves after its first step. Rank 0 notes when its phases end."""

import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.starting.note import note
from deepseek_train.cli import train_rank
from deepseek_train.train import loop

IMPORTS = time.process_time()  # seconds of CPU of the process that ranks are forked from


class Phases:
    """Those of this rank."""

    def __init__(self) -> None:
        self._cpu = 0.0

    def ends(self, phase: str, cpu: float | None = None) -> None:
        now = time.process_time()
        if os.environ["RANK"] == "0":
            note(phase, now - self._cpu if cpu is None else cpu)
        self._cpu = now

    def ends_with(self, owner: Any, name: str, phase: str, then: Callable[[], None] = lambda: None) -> None:
        """From now on ``phase`` ends when ``owner.name`` returns."""
        does = getattr(owner, name)

        def both(*args: Any, **kwargs: Any) -> Any:
            found = does(*args, **kwargs)
            self.ends(phase)
            then()
            return found

        setattr(owner, name, both)


def rank_main(argv: list[str]) -> int:
    """In place of ``cli.train_rank``'s own."""
    phases = Phases()
    phases.ends("imports of ranks", IMPORTS)
    phases.ends_with(train_rank, "agree", "process groups")
    phases.ends_with(train_rank, "build", "build")
    phases.ends_with(loop, "train_step", "first step", lambda: os._exit(0))
    return train_rank.rank_main(argv)
