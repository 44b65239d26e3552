"""Words for people from processes that share one stderr."""

import os


def say(text: str) -> None:
    """Writes ``text`` as whole lines in one piece: what other processes say stands before it or after it. Passes by
    Python's own stderr, which a thread that hangs may have locked. Nothing where it is empty."""
    if text:
        os.write(2, f"{text}\n".encode())
