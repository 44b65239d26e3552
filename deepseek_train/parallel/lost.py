"""Whether an error is the end of somebody else: a connection that broke, as gloo and NCCL put it."""

from collections.abc import Iterator

_BROKEN = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited")


def lost_connection(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, says that a connection broke. Whose end it was it does not say: a rank that
    is gone takes its neighbours along."""
    return any(word in str(cause) for cause in causes(error) for word in _BROKEN)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, what caused that."""
    while error is not None:
        yield error
        error = error.__cause__
