"""A rank whose launcher has vanished saves and leaves: nobody is there to end it, and its run would hold the folder."""

import os
import signal
import threading
import time
from collections.abc import Callable

ORPHAN_SECONDS = 60.0  # what a rank gets to save and leave after its launcher has vanished


def leave_after(vanishing: Callable[[], None]) -> None:
    """Once ``vanishing`` returns, in a thread, this process is asked by SIGTERM to stop, and ended if it does not."""

    def watch() -> None:
        vanishing()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="launcher's end", daemon=True).start()


def torchrun_vanishes() -> None:
    """Returns when the process that started this one is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)
