"""Which failures are a disk's, or those of what stands for one: they may be gone when somebody tries again."""

_MISTAKES = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def storage_failed(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, says that a disk is full, silent or read-only. That a file is not there, or
    not ours, is a mistake, and stays one."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, _MISTAKES):
            return True
        error = error.__cause__
    return False
