"""One run at a time in a run folder: a file beside it, ``<run_dir>.lock``, with the host and the process of rank 0.

On the same host a lock holds as long as its process lives. From another host that cannot be seen, so the holder touches
the file every few seconds, and whoever wants it watches for a while whether it is touched: no clocks are compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

BEAT_SECONDS = 5.0
STALE_BEATS = 4  # without a touch for so many: its holder is gone


class RunFolderTaken(ValueError):
    """Another run works in the folder."""


@dataclass(frozen=True)
class Holder:
    host: str
    pid: int
    born: str  # when the process began, as the system counts: a pid comes back. Empty where it does not tell

    @staticmethod
    def here() -> "Holder":
        return Holder(socket.gethostname(), os.getpid(), _born(os.getpid()))

    @staticmethod
    def of(path: Path) -> "Holder | None":
        """Whoever holds the lock at ``path``; None where nobody can be read there."""
        try:
            return Holder(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


class RunLock:
    """Held from the moment it is made; a context that lets go in the end. Raises RunFolderTaken."""

    def __init__(self, run_dir: Path, beat_seconds: float = BEAT_SECONDS) -> None:
        self.path = run_dir.with_name(f"{run_dir.name}.lock")
        self._me, self._beat = Holder.here(), beat_seconds
        self._over = threading.Event()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._took():
            self._clear_away_or_raise()
        self._thread = threading.Thread(target=self._touch, name="run lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()
        if Holder.of(self.path) == self._me:
            with contextlib.suppress(
                OSError
            ):  # a disk gone read-only: whoever comes next sees that nobody lives
                self.path.unlink()

    def _took(self) -> bool:
        """Whether the lock is ours now: it appears under its name whole, or not at all."""
        draft = self.path.with_name(f"{self.path.name}.{self._me.host}.{self._me.pid}")
        draft.write_text(json.dumps(asdict(self._me)))
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _clear_away_or_raise(self) -> None:
        """The lock there is of somebody else's."""
        holder = Holder.of(self.path)
        if holder is not None and (self._alive_here(holder) if self._is_local(holder) else self._beats()):
            raise RunFolderTaken(
                f"another run works in {self.path.with_suffix('')}: process {holder.pid} on {holder.host}. End it, or "
                f"use another name=... or run_dir=.... ({self.path} says so.)"
            )
        if Holder.of(self.path) == holder:  # else somebody was faster
            aside = self.path.with_name(f"{self.path.name}.stale.{self._me.host}.{self._me.pid}")
            with contextlib.suppress(FileNotFoundError):
                self.path.rename(aside)
                aside.unlink()

    def _is_local(self, holder: Holder) -> bool:
        return holder.host == self._me.host

    def _alive_here(self, holder: Holder) -> bool:
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            return True
        return _born(holder.pid) == holder.born

    def _beats(self) -> bool:
        """Whether the holder touches its lock."""
        first = self._touched()
        for _ in range(STALE_BEATS):
            time.sleep(self._beat)
            if self._touched() != first:
                return True
        return False

    def _touched(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _touch(self) -> None:
        while not self._over.wait(self._beat):
            if Holder.of(self.path) == self._me:
                with contextlib.suppress(OSError):  # a network disk may have its moments
                    os.utime(self.path)


def _born(pid: int) -> str:
    """The start of a process in ticks since the machine's; empty if it is gone or a zombie, or the system has no
    /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
