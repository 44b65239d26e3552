"""What goes wrong with checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read: what, where, what was expected. The same on every rank."""


class CheckpointUnreadable(CheckpointError):
    """The disk does not answer: whether the checkpoint is whole cannot be told. No reason to set it aside."""
