"""One run at a time in a run folder: a file beside it, ``<run_dir>.lock``, with the host and the process of rank 0.

On the same host a lock holds as long as its process lives. From another host that cannot be seen, so the holder touches
the file every few seconds, and whoever wants it watches for a while whether it is touched: no clocks are compared.

A dead holder's lock is taken over by whoever holds a lock for that, ``<run_dir>.lock.takeover``, got in the same way.
So a lock that names a dead holder changes only in the hands of one starter, and what that one saw is still so when it
puts its own in place. Both steps are one operation of the file system: a link, which fails where there is a file, and a
rename over it.
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
        self._take(self.path)
        self._thread = threading.Thread(target=self._touch, name="run lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()
        self._let_go(self.path)

    def _take(self, path: Path) -> None:
        """Makes the lock ``path`` ours. Raises RunFolderTaken."""
        draft = path.with_name(f"{path.name}.{self._me.host}.{self._me.pid}")
        draft.write_text(json.dumps(asdict(self._me)))
        try:
            while not self._linked(draft, path):
                holder = Holder.of(path)
                self._raise_if_alive(path, holder)
                takeover = path.with_name(f"{path.name}.takeover")
                self._take(takeover)
                try:
                    if (
                        Holder.of(path) == holder and path.exists()
                    ):  # else somebody has taken it over, or let go
                        draft.replace(path)
                        return
                finally:
                    self._let_go(takeover)
        finally:
            draft.unlink(missing_ok=True)

    @staticmethod
    def _linked(draft: Path, path: Path) -> bool:
        """Whether the lock is ours: it appears under its name whole, or not at all."""
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        return True

    def _let_go(self, path: Path) -> None:
        if Holder.of(path) == self._me:
            with contextlib.suppress(OSError):  # read-only by now: whoever comes next sees that nobody lives
                path.unlink()

    def _raise_if_alive(self, path: Path, holder: Holder | None) -> None:
        if holder is not None and (self._alive_here(holder) if self._is_local(holder) else self._beats(path)):
            raise RunFolderTaken(
                f"another run works in {self.path.with_suffix('')}: process {holder.pid} on {holder.host}. End it, or "
                f"use another name=... or run_dir=.... ({path} says so.)"
            )

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

    def _beats(self, path: Path) -> bool:
        """Whether the holder touches its lock."""
        first = self._touched(path)
        for _ in range(STALE_BEATS):
            time.sleep(self._beat)
            if self._touched(path) != first:
                return True
        return False

    @staticmethod
    def _touched(path: Path) -> int | None:
        try:
            return path.stat().st_mtime_ns
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
