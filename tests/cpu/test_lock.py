"""One run at a time in a folder: refused while its holder lives, taken over when it is gone."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_train.train.lock import Holder, RunFolderTaken, RunLock

BEAT = 0.05


def holder_at(path: Path, host: str, pid: int, born: str = "") -> None:
    path.write_text(json.dumps({"host": host, "pid": pid, "born": born}))


def test_a_living_holder_is_named(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        assert Holder.of(lock.path) == Holder.here()
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(RunFolderTaken, match=f"{tmp_path / 'run'}: {holder}"):
            RunLock(tmp_path / "run")
        assert Holder.of(lock.path) == Holder.here()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "run"):
        pass


def test_a_dead_holder_on_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    holder_at(tmp_path / "run.lock", socket.gethostname(), ended.pid, "12")
    began = time.monotonic()
    with RunLock(tmp_path / "run"):
        assert time.monotonic() - began < 1
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_dead_ones_number_is_no_holder(tmp_path: Path) -> None:
    holder_at(tmp_path / "run.lock", socket.gethostname(), os.getpid(), "12")
    with RunLock(tmp_path / "run") as lock:
        assert Holder.of(lock.path) == Holder.here()


def test_another_host_is_believed_while_it_touches_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    holder_at(path, "elsewhere", 1)
    code = f"import os, time\nwhile True: os.utime({str(path)!r}); time.sleep(0.01)"
    with subprocess.Popen([sys.executable, "-c", code]) as beating:
        try:
            deadline = time.monotonic() + 30
            written = path.stat().st_mtime_ns
            while path.stat().st_mtime_ns == written and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(RunFolderTaken, match="process 1 on elsewhere"):
                RunLock(tmp_path / "run", BEAT)
        finally:
            beating.kill()
    with RunLock(tmp_path / "run", BEAT):  # now it is silent
        assert Holder.of(path) == Holder.here()


def test_a_lock_that_cannot_be_read_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("{")
    with RunLock(tmp_path / "run"):
        pass


def test_the_holder_touches_its_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run", BEAT) as lock:
        first = lock.path.stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while lock.path.stat().st_mtime_ns == first and time.monotonic() < deadline:
            time.sleep(BEAT)
        assert lock.path.stat().st_mtime_ns > first


def test_only_one_of_many_gets_a_stale_lock(tmp_path: Path) -> None:
    holder_at(tmp_path / "run.lock", socket.gethostname(), 2**22 + 1)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom deepseek_train.train.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    contenders = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    while sum(one.poll() is not None for one in contenders) < 3:
        time.sleep(0.02)
    errors = [one.communicate()[1] for one in contenders]
    assert sum("RunFolderTaken" in error for error in errors) == 3
    assert sum(one.returncode == 0 for one in contenders) == 1


# Starts like the command, but stops before it first renames anything, until it is told to go on.
LATE = """
import os, sys
from pathlib import Path
from deepseek_train.train.lock import RunLock

def wait(original):
    def late(*args):
        os.rename, os.replace = rename, replace
        print("about to rename", flush=True)
        sys.stdin.readline()
        return original(*args)
    return late

rename, replace = os.rename, os.replace
os.rename, os.replace = wait(rename), wait(replace)
with RunLock(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def late_starter(run: Path) -> "subprocess.Popen[str]":
    """It has found the lock of a dead run, and is about to clear it away."""
    command = [sys.executable, "-c", LATE, str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    starter: subprocess.Popen[str] = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
    assert starter.stdout is not None
    assert starter.stdout.readline() == "about to rename\n"
    return starter


def test_of_two_that_find_the_same_dead_holder_one_wins(tmp_path: Path) -> None:
    holder_at(tmp_path / "run.lock", socket.gethostname(), 2**22 + 1)
    late = late_starter(tmp_path / "run")
    with pytest.raises(RunFolderTaken, match=f"process {late.pid} on .*takeover says so"):
        RunLock(tmp_path / "run")
    assert late.communicate("go on\n")[0] == "mine\n"
    assert list(tmp_path.iterdir()) == []


def test_one_that_dies_while_it_takes_over_holds_nobody_up(tmp_path: Path) -> None:
    holder_at(tmp_path / "run.lock", socket.gethostname(), 2**22 + 1)
    late = late_starter(tmp_path / "run")
    late.kill()
    late.communicate()
    with RunLock(tmp_path / "run") as lock:
        assert Holder.of(lock.path) == Holder.here()
