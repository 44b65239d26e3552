"""When a run saves and what becomes of it: written behind the steps, tried again soon where it failed, and a reason to
stop only when it has failed many times in a row.
"""

import time
from collections.abc import Callable

from deepseek_train.checkpoint.errors import CheckpointError, StorageFailed
from deepseek_train.checkpoint.pieces import Snapshot
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.saver import Saver
from deepseek_train.config.schema import CheckpointConfig

_INSIST_SECONDS = (1.0, 4.0, 15.0)  # between attempts of a save that nothing comes after


class Saving:
    """All methods but ``due``, ``put_off``, ``writing`` and ``close`` are collective. ``say`` is heard on rank 0;
    ``saved`` is told of each checkpoint."""

    def __init__(
        self,
        saver: Saver,
        config: CheckpointConfig,
        say: Callable[[str], None],
        saved: Callable[[int, Place], None] = lambda step, path: None,
    ) -> None:
        self._saver, self._config, self._say, self._saved = saver, config, say, saved
        self._began = 0.0  # monotonic seconds
        self._stall = 0.0  # seconds the run waited for the save under way
        self.failures = 0  # in a row
        self._again: int | None = (
            None  # from this step on: a save that failed, or was put off, is made up for
        )
        self._insisting = False

    @property
    def running(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._saver.running is not None

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self._saver.writing

    def due(self, step: int) -> bool:
        every = self._config.every
        return (every > 0 and step % every == 0) or (self._again is not None and step >= self._again)

    def put_off(self, step: int) -> None:
        """The save due after ``step`` waits for the next one."""
        self._again = step + 1

    def begin(self, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Starts to save; waits for the save under way first, if there is one. A failure is told and counted. Raises
        StorageFailed after ``max_failures`` in a row."""
        if self.running:
            self._say(f"checkpoint of step {self._saver.running} is still being written: step {step} waits")
            self.finish()
        self._again = None
        self._began = time.monotonic()
        try:
            self._saver.begin(step, snapshot())
        except CheckpointError as error:
            self._failed(step, error)
        self._stall = time.monotonic() - self._began

    def finish(self) -> None:
        """Makes the save under way a checkpoint, or tells and counts its failure, as ``begin`` does."""
        step = self._saver.running
        assert step is not None
        started = time.monotonic()
        try:
            path = self._saver.finish()
        except CheckpointError as error:
            self._failed(step, error)
            return
        now = time.monotonic()
        self.failures = 0
        self._saved(step, path)
        stall = self._stall + now - started
        self._say(f"checkpoint: {path} ({stall:.2f} s waited for, {now - self._began:.1f} s in all)")

    def insist(self, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Saves and waits for it, several times if need be, however many have failed before. Raises StorageFailed
        where all fail."""
        self._insisting = True
        for pause in (*_INSIST_SECONDS, None):
            self.begin(step, snapshot)
            if self.running:
                self.finish()
            if not self.failures:
                return
            if pause is not None:
                time.sleep(pause)
        raise StorageFailed(
            f"step {step} could not be saved: make room or mend the disk, and start again from the checkpoint before"
        )

    def settle(self) -> None:
        """Finishes the save under way, if there is one, and waits until what it replaces is gone. Raises
        StorageFailed on every rank where the disk does not answer."""
        if self.running:
            self.finish()
        self._saver.settle()

    def close(self) -> None:
        self._saver.close()

    def _failed(self, step: int, error: CheckpointError) -> None:
        self.failures += 1
        self._again = step + 2 ** min(self.failures - 1, 10)
        most = self._config.max_failures
        self._say(f"WARNING: step {step} was not saved (failure {self.failures} of {most} in a row): {error}")
        if self.failures >= most and not self._insisting:
            raise StorageFailed(
                f"{self.failures} saves in a row failed, so the run stops (checkpoint.max_failures); the last: {error}"
            )
