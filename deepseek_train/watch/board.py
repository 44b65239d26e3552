"""The board of a node: one slot a rank in a file that all ranks of the machine map into their memory.

A rank locks its slot as long as it lives. The kernel lets go of the lock when the process dies, however it dies, before
anybody has collected it; so whether the writer of a slot lives is known at once, and its pid is still its own.
"""

import fcntl
import mmap
import os
from pathlib import Path

from deepseek_train.watch.whereabouts import SLOT_BYTES, Sight, State, Whereabouts


class Board:
    """Slots by global rank; those of ranks on other machines stay empty. One object a process and file: closing a
    second one would let go of the lock."""

    def __init__(self, path: Path, world_size: int) -> None:
        """Opens the board, made if it is not there."""
        size = world_size * SLOT_BYTES
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._file).st_size < size:
            os.ftruncate(self._file, size)
        memory = memoryview(mmap.mmap(self._file, size))
        self._slots = [Whereabouts(memory[r * SLOT_BYTES : (r + 1) * SLOT_BYTES]) for r in range(world_size)]

    def take(self, rank: int) -> Whereabouts:
        """The slot of ``rank``, for this process to write."""
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, SLOT_BYTES, rank * SLOT_BYTES)
        self._slots[rank].enter(os.getpid())
        return self._slots[rank]

    def sights(self) -> list[Sight]:
        """Of all ranks that have begun on this machine."""
        seen = (slot.seen(rank) for rank, slot in enumerate(self._slots))
        return [sight for sight in seen if sight.state is not State.ABSENT]

    def lost(self) -> list[Sight]:
        """Ranks of this machine that died without a word."""
        here = (sight for sight in self.sights() if sight.state is State.HERE)
        return [sight for sight in here if not self.lives(sight)]

    def lives(self, sight: Sight) -> bool:
        """Whether the process that wrote the slot is there."""
        if sight.pid == os.getpid():
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, SLOT_BYTES, sight.rank * SLOT_BYTES)
        except BlockingIOError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, SLOT_BYTES, sight.rank * SLOT_BYTES)
        return False
