"""A thread in every rank that observes: is the main thread getting on, are the other ranks of this machine alive?

It never touches what the main thread does. When nothing can come of waiting any more it writes down who stands where,
ends frozen siblings, which nobody else could, and leaves the process, so that whoever started the ranks starts anew.
Patience is counted in the thread's own ticks: while the whole machine or the whole run was stopped, no time passes.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from deepseek_train.config.exit_codes import ExitCode
from deepseek_train.watch.board import Board
from deepseek_train.watch.judge import Condition, Judged, Patience, judged, verdict
from deepseek_train.watch.say import say
from deepseek_train.watch.whereabouts import Sight, State, Whereabouts

STACK_SIGNAL = signal.SIGUSR2  # makes a rank write its stacks to stderr and go on
LOST_SECONDS = 2.0  # what the main thread gets to find out by itself that a peer is gone
STACK_SECONDS = 0.3  # what a frozen rank gets to write its stacks, if it is not stopped altogether


@dataclass(frozen=True)
class Rules:
    """Seconds without progress that count as a hang: in a step, and in phases that may be long."""

    hang_seconds: float
    long_seconds: float

    @property
    def interval(self) -> float:
        """Between two ticks."""
        return min(0.5, self.hang_seconds / 8)

    @property
    def tick_seconds(self) -> float:
        """A watchdog silent for so long is frozen. Machines with many ranks on few cores make some late."""
        return max(2.0, 4 * self.interval)


class Watchdog:
    """Watches from ``start`` to ``close``. ``reports``: the folder for what it finds."""

    def __init__(self, board: Board, rank: int, world_size: int, rules: Rules, reports: Path) -> None:
        self.where: Whereabouts = board.take(rank)
        self._board, self._rank, self._world_size = board, rank, world_size
        self._rules, self._reports = rules, reports
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)
        self._thread.start()

    def close(self) -> None:
        """The rank is about to end, in good order or with an error that it tells itself."""
        self.where.leave()
        self._closed.set()
        self._thread.join()

    def others_fault(self) -> tuple[str, ExitCode] | None:
        """When this rank has failed: whether another one of this machine made it, in words and as an exit code. A rank
        that died takes its peers along, whose messages then name each other."""
        if any(sight.alarm_ns for sight in self._board.sights()):
            return "", ExitCode.HUNG  # the report is written
        lost = self._board.lost()
        return (self._obituary(lost), ExitCode.PEER_LOST) if lost else None

    def _obituary(self, lost: list[Sight]) -> str:
        """Which ranks have died without a word, one a line; empty where a sibling says it, the first that lives."""
        here = (s.rank for s in self._board.sights() if s.state is State.HERE and self._board.lives(s))
        if min(here, default=self._rank) != self._rank:
            return ""
        return "\n".join(f"rank {s.rank} lost at {s.place} (pid {s.pid})" for s in lost)

    def _watch(self) -> None:
        idle, missed, seen, before = 0.0, 0.0, 0, time.monotonic()
        while not self._closed.wait(self._rules.interval):
            self.where.tick()
            now = time.monotonic()
            passed, before = min(now - before, 2 * self._rules.interval), now
            sights = self._board.sights()
            me = next(s for s in sights if s.rank == self._rank)
            idle, seen = (idle + passed if me.progress_ns == seen else 0.0), me.progress_ns
            lost = self._board.lost()
            missed = missed + passed if lost else 0.0
            if missed > LOST_SECONDS:
                say(self._obituary(lost))
                self._leave(ExitCode.PEER_LOST)
            # A sibling that saves, say, keeps others waiting in their next step.
            limit = self._rules.long_seconds if any(s.long for s in sights) else self._rules.hang_seconds
            called = any(s.alarm_ns for s in sights)
            if idle > limit or called:
                self.where.alarm()
                self._report(idle, called=called)

    def _report(self, idle: float, *, called: bool) -> None:
        """Writes all that can be seen from here, ends the frozen, and leaves. ``called``: another rank saw it first."""
        ranks = self._judge(idle)
        text = "\n".join(
            [
                f"rank {self._rank} " + ("was called" if called else f"hangs: no progress for {idle:.1f} s"),
                verdict(ranks, self._world_size),
                "Ranks of this machine:",
                *(f"  {one}" for one in ranks),
            ]
        )
        me = next(one.sight for one in ranks if one.sight.rank == self._rank)
        path = self._reports / f"rank-{self._rank:05}-step-{me.step:08}.txt"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{text}\nStacks of rank {self._rank}, innermost call first:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            text += f"\nStacks: {path}"
        if not called:
            say(text)
        self._closed.wait(2 * self._rules.interval)  # siblings see the alarm, and write theirs
        self._end([one for one in ranks if one.condition is Condition.FROZEN])
        self._leave(ExitCode.HUNG)

    def _judge(self, idle: float) -> list[Judged]:
        """All ranks of the machine. Whoever has been silent nearly as long as this one has stopped too."""
        patience = Patience(self._rules.tick_seconds, max(0.0, idle / 2))
        sights, now = self._board.sights(), time.monotonic_ns()
        return [judged(sight, self._board.lives(sight), now, patience) for sight in sights]

    def _end(self, frozen: list[Judged]) -> None:
        for signum, pause in ((STACK_SIGNAL, STACK_SECONDS), (signal.SIGKILL, 0.0)):
            for one in frozen:
                if self._board.lives(one.sight):  # then the pid is its own
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(one.sight.pid, signum)
            time.sleep(pause if frozen else 0.0)

    def _leave(self, code: ExitCode) -> None:
        if not self._closed.is_set():  # else the main thread has failed meanwhile, and leaves
            self.where.leave()
            os._exit(code)
