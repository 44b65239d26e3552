"""Standard output that nobody reads any more, or that never was, is no reason to end a run."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO, cast


@contextmanager
def safe_streams() -> Iterator[None]:
    """Inside, what is printed where nobody reads it is lost, and that is all. Standard descriptors that are closed lead
    to the null device from now on: the next file to be opened, a checkpoint say, would get their numbers and text."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    null = io.StringIO()
    out, err = (cast(TextIO, SafeStream(stream or null)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()


class SafeStream(io.TextIOBase):
    """A stream that falls silent instead of raising when nobody reads it any more (``| head``, lost ssh)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    @property
    def encoding(self) -> str:  # type: ignore[override]  # rich asks it which box characters it may use
        return self._stream.encoding or "ascii"

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a log file in an ASCII locale
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except (OSError, ValueError):
                self._fall_silent()
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: the file object is closed
                self._fall_silent()

    def _fall_silent(self) -> None:
        """Points the descriptor at the null device, else Python fails once more when it flushes at exit."""
        self._gone = True
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            return  # not a descriptor: there is nothing left to flush
