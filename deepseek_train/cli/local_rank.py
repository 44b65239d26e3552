"""The inside of one local rank: surroundings as torchrun makes them, the target, a file for its failure."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_train.cli.orphan import leave_after

BOARD_FILE = "board"  # in the launch's folder: train.watching posts watchdogs around it


@dataclass(frozen=True)
class RankError:
    """How a rank failed, in its own words."""

    when: float  # seconds on the system's monotonic clock
    text: str  # traceback, or the message of a SystemExit


def run_rank(target: str, argv: Sequence[str], rank: int, world_size: int, folder: str, cwd: str) -> None:
    """Call ``target(argv)`` as ``rank``, in ``cwd``; ends the process with the target's exit code."""
    # SIGINT stays blocked, see launch_local.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        leave_after(launcher.join)
    os.chdir(cwd)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        DEEPSEEK_TRAIN_STORE=str(Path(folder) / "store"),
        DEEPSEEK_TRAIN_BOARD=str(Path(folder) / BOARD_FILE),
    )
    try:
        sys.exit(call(target, argv))
    except SystemExit as end:
        if isinstance(end.code, str):
            _leave_error(folder, rank, end.code)
            sys.exit(1)
        raise
    except BaseException:  # the launcher prints it, after everything else
        _leave_error(folder, rank, traceback.format_exc())
        sys.exit(1)


def call(target: str, argv: Sequence[str]) -> int:
    """``function(argv)`` of "package.module:function", which is imported now; its exit code, None counting as 0."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(list(argv)) or 0


def read_errors(folder: Path) -> dict[int, RankError]:
    """What failed ranks left behind."""
    errors = {}
    for path in folder.glob("*.error"):
        when, _, text = path.read_text().partition("\n")
        errors[int(path.stem)] = RankError(float(when), text)
    return errors


def _leave_error(folder: str, rank: int, text: str) -> None:
    draft = Path(folder) / f"{rank}.draft"
    draft.write_text(f"{time.monotonic()}\n{text}")
    draft.rename(draft.with_suffix(".error"))
