"""What goes wrong with checkpoints."""


def reason(error: Exception) -> str:
    """An error's own words, for a message that has named the file."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read: what, where, what was expected. The same on every rank."""


class NoCheckpoint(CheckpointError):
    """There is none in the place that was named."""


class StorageFailed(CheckpointError):
    """The disk did not do it: it is full, silent or read-only, and may be mended when somebody tries again."""


class CheckpointUnreadable(CheckpointError):
    """Whether the checkpoint is whole cannot be told: the disk does not answer, or another version wrote it. No reason
    to set it aside."""
