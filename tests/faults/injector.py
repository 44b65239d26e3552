"""``deepseek-train`` with faults. ``FAULTS="kill forward 1 3; stop save 0 4"``: rank 1 kills itself in the forward pass
of step 3, rank 0 stops when it first saves in or after step 4, and so on; once in a run's life (but for ``ALWAYS``),
so not again when it comes back to that step. See ``STRIKES`` and ``PLACES``. ``SLOW=r``: the experts of rank r take
their time. ``ODD=r``: rank r has other code. A report, whose pictures take their time, is made where ``REPORT`` is set.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_train.checkpoint import folders, manifest, retention, saver
from deepseek_train.cli import train_rank
from deepseek_train.model.block import MoeBlock
from deepseek_train.optim.zero1 import Zero1
from deepseek_train.train import agreement, loop, saving, step
from deepseek_train.train.observer import Observer
from tests.faults.strikes import ALWAYS, STRIKES

PLACES: dict[str, tuple[Any, str]] = {
    "forward": (step, "on_device"),
    "optimizer": (Zero1, "reduce"),
    # A save, from its beginning to the end:
    "save": (saving.Saving, "begin"),
    "begin": (saver.Saver, "begin"),  # the save before is over
    "files": (saver, "write_tensor_file"),  # behind the steps
    "index": (saver, "write_synced"),  # this and what follows: rank 0
    "manifest": (folders, "write_manifest"),
    "rename": (manifest, "fsync_folder"),
    "renamed": (folders, "fsync_folder"),
    "retire": (retention, "remove_folder"),
}


class Faults:
    """The faults of one rank."""

    def __init__(self, words: list[list[str]]) -> None:
        self._step = 0
        self._job: Any = None
        before(loop, "train_step", self._note)
        for what, where, _, number in words:
            before(*PLACES[where], lambda *_, w=what, p=where, n=number: self._perhaps(w, p, int(n)))

    def _note(self, job: Any, progress: Any, **_: Any) -> None:
        self._job, self._step = job, progress.step + 1

    def _perhaps(self, what: str, where: str, number: int) -> None:
        if what in ALWAYS:
            if self._step == number:
                STRIKES[what](self._job)
        elif self._step >= number:
            mark = Path(f"struck-{self._job.config.name}-{what}-{where}-{number}")
            if not mark.exists():
                mark.touch()
                STRIKES[what](self._job)


def before(owner: Any, name: str, do: Callable[..., None]) -> None:
    """From now on ``do`` comes first, in this process."""
    then = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        do(*args, **kwargs)
        return then(*args, **kwargs)

    setattr(owner, name, both)


def rank_main(argv: list[str]) -> int:
    """In place of ``cli.train_rank``'s own, in every rank."""
    rank = os.environ.get("RANK", "0")
    words = [fault.split() for fault in os.environ.get("FAULTS", "").split(";") if fault]
    Faults([fault for fault in words if fault[2] == rank])
    if rank == os.environ.get("SLOW"):
        before(MoeBlock, "compute", lambda *_: time.sleep(0.05))
    if rank == os.environ.get("ODD"):
        setattr(agreement, "_code", lambda: "yesterdays")  # noqa: B010
    if "REPORT" not in os.environ:
        setattr(Observer, "report", lambda *_: None)  # noqa: B010
    return train_rank.rank_main(argv)
