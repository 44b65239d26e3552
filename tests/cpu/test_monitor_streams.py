"""Standard streams that are closed, or end, cost a run nothing."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
from deepseek_train.monitor.streams import safe_streams
from deepseek_train.watch.say import say
with safe_streams():
    file = open("written", "w")
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    say("in one piece")
    file.write("its own text")
    file.close()
"""


def text_of(tmp_path: Path, redirections: str) -> tuple[int, str]:
    """Exit code and content of the file that the program wrote."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirections}', sys.executable, PROGRAM],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p)},
        timeout=60,
        check=False,
    )
    return done.returncode, (tmp_path / "written").read_text()


def test_closed_streams_are_not_the_next_file(tmp_path: Path) -> None:
    assert text_of(tmp_path, "<&- >&- 2>&-") == (0, "its own text")


def test_a_full_stdout_is_no_error(tmp_path: Path) -> None:
    assert text_of(tmp_path, ">/dev/full 2>/dev/full") == (0, "its own text")
