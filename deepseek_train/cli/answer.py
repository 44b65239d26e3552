"""The frame of commands that answer a question and end: help, mistakes all at once, a reader that leaves early."""

import os
import sys
from collections.abc import Callable, Sequence

from deepseek_train.cli.key_value import UsageError

INTERRUPTED = 130  # 128 and the number of SIGINT, as shells count


def answer(
    command: str, usage: str | None, words: Sequence[str], say: Callable[[Sequence[str]], None]
) -> int:
    """Has ``say`` print the answer to ``words``, or prints ``usage`` if they ask for help; returns the exit code: 0,
    2 after a UsageError, 130 after Ctrl-C."""
    if not words or {"-h", "--help", "help"} & set(words):
        print(usage)
        return 0
    try:
        say(words)
        sys.stdout.flush()
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        print(f"'{command} --help' shows what can be written.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{command}: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads, "head" perhaps, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
