"""Why a local run failed, in words and as an exit code, once all of its ranks have ended."""

import signal
from collections.abc import Sequence
from pathlib import Path

from deepseek_train.cli.local_rank import BOARD_FILE, RankError
from deepseek_train.config.exit_codes import ExitCode
from deepseek_train.watch.board import Board
from deepseek_train.watch.say import say


def verdict(
    codes: Sequence[int],
    failed: Sequence[int],
    received: Sequence[int],
    errors: dict[int, RankError],
    folder: Path,
) -> int:
    """Prints why the run failed, if it did; returns its exit code, a signal's as a shell counts it. ``failed``: ranks,
    the cause first; ``received``: the user's signals; ``folder``: the launch's."""
    if not failed:
        code = next((code for code in codes if code), 0)
        return 128 + received[-1] if received and (code < 0 or not codes) else abs(code)
    first, *others = failed
    if others:
        say(f"failed after rank {first}: {', '.join(map(str, sorted(others)))}")
    code = codes[first]
    if first in errors:
        text = errors[first].text
    elif code < 0:
        text = f"died of {signal.Signals(-code).name}{_place(folder, len(codes), first)}"
    else:
        text = f"left with exit code {code}"
    say("\n".join(f"[rank {first}] {line}" for line in text.rstrip().splitlines()))
    if ExitCode.HUNG in codes:  # the rank that was killed for it is no other story
        return ExitCode.HUNG
    return code if code > 0 else 128 - code


def _place(folder: Path, world_size: int, rank: int) -> str:
    """Where the rank was at last, if its ranks have a board."""
    path = folder / BOARD_FILE
    if not path.exists():
        return ""
    seen = [sight for sight in Board(path, world_size).sights() if sight.rank == rank]
    return f": rank {rank} lost at {seen[0].place}" if seen else ""
