"""How commands that run ranks end, in numbers. What starts them again goes by these.

A stop that was asked for (SIGINT, SIGTERM, SIGUSR1 or train.stop_after_seconds) is COMPLETE too, once all is saved:
torchrun starts ranks anew after any other code, and a run that was told to stop would come back. Whoever requeues jobs
asks the file ``outcome`` in the run folder, whose first word is ``complete`` or ``stopped``. torchrun itself leaves
with 1 whatever its ranks' code was.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Below 128: a command that a signal ended leaves with 128 + its number."""

    COMPLETE = 0
    FAILED = 1
    USER_ERROR = 2
    NO_CHECKPOINT = 3
    PEER_LOST = 4
    HUNG = 5
    GIVEN_UP = 6
    REPLICAS_DIFFER = 7
    OUT_OF_MEMORY = 8
    STORAGE = 9


MEANING = {
    ExitCode.COMPLETE: "complete, or stopped on request and saved: the same command goes on",
    ExitCode.FAILED: "an error that nobody foresaw; its traceback is printed",
    ExitCode.USER_ERROR: "the configuration, the data or the launch is wrong: starting again will not help",
    ExitCode.NO_CHECKPOINT: "there were checkpoints, and none is whole, or none is there: somebody must look",
    ExitCode.PEER_LOST: "another rank died; its last place is printed: start again",
    ExitCode.HUNG: "nothing moved for too long; reports are in the run folder's hangs/: start again",
    ExitCode.GIVEN_UP: "the guard against bad steps went back in vain: somebody must look",
    ExitCode.REPLICAS_DIFFER: "copies of a weight differ: start again, perhaps without the rank that is named",
    ExitCode.OUT_OF_MEMORY: "a rank has no memory left: start again, smaller where it happens again",
    ExitCode.STORAGE: "a disk is full, silent or read-only: start again, once it is mended",
}

# After these a new start ends the same way.
FINAL = frozenset({ExitCode.COMPLETE, ExitCode.USER_ERROR, ExitCode.NO_CHECKPOINT, ExitCode.GIVEN_UP})
