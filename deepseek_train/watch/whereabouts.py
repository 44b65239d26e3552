"""Where a rank is: a slot of fixed size that its main thread writes as it goes, and anybody may read.

Writing costs about a microsecond and can neither fail nor wait, so whatever works on a step may say where it stands. A
``Whereabouts`` is passed to it like any other value; ``unseen()`` makes one that nobody reads.
"""

import struct
import time
from dataclasses import dataclass
from enum import IntEnum

SLOT_BYTES = 512
_HEAD = struct.Struct("<8q")  # pid, state, step, long, waiting, progress, tick, alarm
_PID, _STATE, _STEP, _LONG, _WAITING, _PROGRESS, _TICK, _ALARM = range(0, 64, 8)
_PHASE, _DOING, _TRANSFER, _END = 64, 128, 256, SLOT_BYTES
_NUMBER = struct.Struct("<q")


class State(IntEnum):
    """Of a rank in its own words."""

    ABSENT = 0  # not begun
    HERE = 1
    LEFT = 2  # it has ended as it wanted to, or told its error itself


@dataclass(frozen=True)
class Sight:
    """What a slot says. Times are nanoseconds of the machine's monotonic clock."""

    rank: int
    pid: int
    state: State
    step: int
    phase: str
    doing: str  # the action under way, with its phase
    transfer: str  # the last transfer it waited for or started, with its peers
    waiting: bool  # for that transfer, now
    long: bool  # the phase may take as long as a collective may
    progress_ns: int  # when its main thread last said something
    tick_ns: int  # when its watchdog last ran: a stopped process does not tick
    alarm_ns: int  # when its watchdog called a hang; 0: it has not

    @property
    def place(self) -> str:
        """The rank's place in one line."""
        word = "in" if self.waiting else "after"
        transfer = f"; {word} transfer: {self.transfer}" if self.transfer else ""
        return f"step {self.step}, {self.phase or 'start'}{', ' + self.doing if self.doing else ''}{transfer}"


class Whereabouts:
    """Writes one slot. Only the rank's main thread calls it, but for ``tick`` and ``alarm``."""

    def __init__(self, slot: memoryview) -> None:
        """``slot``: SLOT_BYTES bytes, writable."""
        self._slot = slot
        self._known: set[str] = set()  # phases that have been entered

    @staticmethod
    def unseen() -> "Whereabouts":
        """For whom nobody watches."""
        return Whereabouts(memoryview(bytearray(SLOT_BYTES)))

    def enter(self, pid: int) -> None:
        """The rank begins."""
        now = time.monotonic_ns()
        self._slot[_PHASE:_END] = bytes(_END - _PHASE)
        _HEAD.pack_into(self._slot, 0, pid, State.HERE, 0, 1, 0, now, now, 0)

    def leave(self) -> None:
        """The rank ends, and nobody need ask why."""
        self._set(_STATE, State.LEFT)

    def phase(self, name: str, step: int | None = None, *, long: bool = False) -> None:
        """A new phase of the run. ``step``: the optimizer step under way, where it is another one; ``long``: this may
        take as long as a collective is given, as searching and saving do. So may the first time of every phase: kernels
        are compiled and connections made."""
        self._text(_PHASE, _DOING, name)
        self._text(_DOING, _TRANSFER, "")
        if step is not None:
            self._set(_STEP, step)
        self._set(_LONG, long or name not in self._known)
        self._known.add(name)
        self.goes_on()

    def at(self, doing: str) -> None:
        """A new piece of work inside the phase."""
        self._text(_DOING, _TRANSFER, doing)
        self.goes_on()

    def started(self, transfer: str) -> None:
        """A transfer has left; nobody waits for it yet."""
        self._text(_TRANSFER, _END, transfer)
        self.goes_on()

    def waits(self, transfer: str) -> None:
        """From now until the next word this rank waits for a transfer; ``transfer`` names its peers."""
        self._text(_TRANSFER, _END, transfer)
        self._set(_WAITING, 1)
        self._set(_PROGRESS, time.monotonic_ns())

    def goes_on(self) -> None:
        """What it waited for is here."""
        self._set(_WAITING, 0)
        self._set(_PROGRESS, time.monotonic_ns())

    def tick(self) -> None:
        """The watchdog runs."""
        self._set(_TICK, time.monotonic_ns())

    def alarm(self) -> None:
        """The watchdog has called a hang."""
        self._set(_ALARM, time.monotonic_ns())

    def seen(self, rank: int) -> Sight:
        """What the slot says now. Another process may be writing to it: a text may be half old, half new."""
        pid, state, step, long, waiting, progress, tick, alarm = _HEAD.unpack_from(self._slot)
        return Sight(
            rank,
            pid,
            State(state),
            step,
            self._read(_PHASE, _DOING),
            self._read(_DOING, _TRANSFER),
            self._read(_TRANSFER, _END),
            bool(waiting),
            bool(long),
            progress,
            tick,
            alarm,
        )

    def _set(self, at: int, value: int) -> None:
        _NUMBER.pack_into(self._slot, at, value)

    def _text(self, start: int, end: int, text: str) -> None:
        size = end - start
        self._slot[start:end] = text.encode()[:size].ljust(size, b"\0")

    def _read(self, start: int, end: int) -> str:
        return bytes(self._slot[start:end]).rstrip(b"\0").decode(errors="replace")
