"""What goes wrong with checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read: what, where, what was expected. The same on every rank."""
