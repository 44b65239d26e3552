"""A thread that works behind the run, one piece after another. What it does may hang, on a disk that is away: whoever
waits for it waits a bounded time, is told what for, and the process may end all the same (the thread is a daemon).
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TypeVar

from deepseek_train.watch.say import say

SAY_SECONDS = 30.0  # between words about what is waited for

T = TypeVar("T")


class Behind:
    """``who`` begins each word of it."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._doing = ""
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    @property
    def doing(self) -> str:
        """What it is at; empty: nothing."""
        return self._doing

    def submit(self, what: str, work: Callable[[], T]) -> Future[T]:
        """Has it do ``work``, called ``what``."""
        done: Future[T] = Future()

        def run() -> None:
            self._doing = what
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            self._doing = ""

        self._work.put(run)
        return done

    def wait(self, work: Future[T], seconds: float) -> bool:
        """Whether ``work`` is done within so many seconds."""
        waited = 0.0
        while waited < seconds:
            pause = min(SAY_SECONDS, seconds - waited)
            if wait([work], pause).done:
                return True
            waited += pause
            say(f"{self._who} has waited {waited:.0f} s for the disk: {self._doing}")
        return work.done()

    def end(self) -> None:
        """There will be no more work."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
