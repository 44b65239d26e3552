"""How commands that run ranks end, in numbers. What starts them again goes by these.

A stop that was asked for (SIGINT, SIGTERM, SIGUSR1 or train.stop_after_seconds) is COMPLETE too, once all is saved:
torchrun starts ranks anew after any other code, and a run that was told to stop would come back. Whoever requeues jobs
asks the file ``outcome`` in the run folder, whose first word is ``complete`` or ``stopped``. torchrun itself leaves
with 1 whatever its ranks' code was.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Below 128: a command that a signal ended leaves with 128 + its number."""

    COMPLETE = 0  # or stopped on request and saved: the same command goes on
    FAILED = 1  # an error that nobody foresaw; its traceback is printed
    USER_ERROR = 2  # the configuration, the data or the launch is wrong: starting again will not help
    NO_CHECKPOINT = 3  # there are checkpoints, and none of them is whole: somebody must look
    PEER_LOST = 4  # another rank died; its last place is printed: start again
    HUNG = 5  # nothing moved for too long; reports are in the run folder's hangs/: start again
    GIVEN_UP = 6  # the guard went back in vain (train/guard.py): somebody must look
    REPLICAS_DIFFER = (
        7  # copies of a weight are not equal: start again, perhaps without the rank that is named
    )
    OUT_OF_MEMORY = 8  # a rank's, named in the message: start again, smaller where it happens again
    STORAGE = (
        9  # a disk, or what stands for one, is full, silent or read-only: start again, once it is mended
    )


# After these a new start ends the same way.
FINAL = frozenset({ExitCode.COMPLETE, ExitCode.USER_ERROR, ExitCode.NO_CHECKPOINT, ExitCode.GIVEN_UP})
