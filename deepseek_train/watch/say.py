"""Words for people from processes that share one stderr."""

import contextlib
import os


def say(text: str) -> None:
    """Writes ``text`` as whole lines in one piece: what other processes say stands before it or after it. Passes by
    Python's own stderr, which a thread that hangs may have locked. Nothing where it is empty
    or nobody reads it."""
    if text:
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
