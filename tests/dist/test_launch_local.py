"""The local launcher as a user meets it: a command in a terminal, with failures, crashes and Ctrl-C."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def temp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens, the launcher leaves no folder behind."""
    with tempfile.TemporaryDirectory(prefix="t_") as short:  # a socket's path must be short
        monkeypatch.setenv("TMPDIR", short)
        yield
        left = [path.name for path in Path(short).iterdir() if path.name.startswith("deepseek_train_")]
        assert left == []


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.dist.launch_targets", *map(str, arguments)]


def run(*arguments: object) -> tuple[int, str, float]:
    """Exit code, output and seconds of the launcher."""
    began = time.monotonic()
    done = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The launcher in a process group of its own, as under a terminal; ended by its id if need be."""
    with subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process: subprocess.Popen[str], ranks: int) -> list[int]:
    """Read until every rank said so; returns their pids."""
    assert process.stdout is not None
    pids: list[int] = []
    while len(pids) < ranks:
        line = process.stdout.readline()
        assert line, "the launcher ended"
        if line.startswith("ready pid="):
            pids.append(int(line.partition("=")[2]))
    return pids


def test_ranks_find_their_surroundings(tmp_path: Path) -> None:
    code, output, _ = run("show_environment", 3, tmp_path)
    assert code == 0, output
    for rank in range(3):
        seen = dict(line.split("=", 1) for line in (tmp_path / str(rank)).read_text().splitlines())
        assert (seen["RANK"], seen["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"], seen["OMP_NUM_THREADS"]) == ("3", "3", "1")
        assert seen["DEEPSEEK_TRAIN_STORE"].endswith("/store")
        assert seen["cwd"] == str(ROOT)
        assert seen["json"] == "True"  # preloaded


def test_ranks_meet() -> None:
    code, output, _ = run("all_reduce", 2)
    assert code == 3, output  # 1 + 2


def test_the_first_failure_is_printed_last_with_its_rank() -> None:
    code, output, seconds = run("rank_one_raises", 3)
    assert code == 1
    assert output.rstrip().splitlines()[-1] == "[rank 1] ValueError: the cause"
    assert "[rank 1] Traceback (most recent call last):" in output
    assert "failed after rank 1: 0, 2" in output
    assert "Connection reset" not in output
    assert seconds < 15


def test_a_message_is_printed_without_traceback_and_sleepers_are_ended() -> None:
    code, output, seconds = run("rank_one_leaves_a_message", 2)
    assert code == 1
    assert output.rstrip().splitlines()[-1] == "[rank 1] optim.lr is negative"
    assert "Traceback" not in output
    assert seconds < 15


def test_a_crash_is_named() -> None:
    code, output, _ = run("rank_one_crashes", 2)
    assert code == 128 + signal.SIGSEGV
    assert output.rstrip().splitlines()[-1] == "[rank 1] died of SIGSEGV"


def test_the_exit_code_of_a_rank_is_the_launchers() -> None:
    code, output, _ = run("rank_zero_returns_seven", 2)
    assert (code, output.rstrip().splitlines()[-1]) == (7, "[rank 0] left with exit code 7")


def test_ranks_deaf_to_sigterm_are_killed() -> None:
    code, output, seconds = run("deaf_but_for_rank_one", 2)
    assert (code, output.rstrip().splitlines()[-1]) == (1, "[rank 1] ValueError: the cause")
    assert seconds < 15


def test_ctrl_c_in_a_terminal_lets_the_ranks_finish_their_step() -> None:
    with running("steps_until_told", 3) as process:
        wait_until_ready(process, 3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to launcher, server and ranks
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    assert all(f"finished {rank}" in output for rank in range(3))
    assert "KeyboardInterrupt" not in output


@pytest.mark.parametrize("to_group", [False, True], ids=["launcher only", "whole group"])
def test_sigterm_of_a_scheduler_does_the_same(to_group: bool) -> None:
    with running("steps_until_told", 2) as process:
        wait_until_ready(process, 2)
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    assert "finished 0" in output
    assert "finished 1" in output


def test_a_second_ctrl_c_ends_at_once() -> None:
    with running("steps_until_told", 2, "deaf") as process:
        wait_until_ready(process, 2)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output


def test_ctrl_c_while_the_server_still_imports_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALSO_PRELOAD", "tests.dist.slow_import")
    with running("steps_until_told", 4) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in output
    assert "ready" not in output


def test_ranks_do_not_outlive_a_killed_launcher() -> None:
    with running("steps_until_told", 2) as process:
        pids = wait_until_ready(process, 2)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(_alive(pid) for pid in pids)
        for left in Path(os.environ["TMPDIR"]).glob("deepseek_train_*"):  # nobody was there to do it
            left.rmdir()


@pytest.mark.parametrize(
    ("restarts", "code", "ends", "lives"),
    [(5, 7, 0, 3), (2, 7, 0, 3), (1, 7, 7, 2), (0, 7, 7, 1), (5, 2, 2, 1), (5, 3, 3, 1), (5, 5, 0, 3)],
)
def test_failed_ranks_are_started_again_where_that_may_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: int, code: int, ends: int, lives: int
) -> None:
    monkeypatch.setenv("RESTARTS", str(restarts))
    done, output, _ = run("fails_twice", 2, tmp_path, code)
    assert done == ends, output
    assert output.count("starting the ranks again (") == lives - 1
    seen = [(tmp_path / f"1-{life}").read_text() for life in range(lives)]
    assert seen == [f"{tmp_path} {code}{' again' * (life > 0)}" for life in range(lives)]


def test_a_user_who_stops_a_run_is_not_defied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTARTS", "5")
    with running("steps_until_told", 2) as process:
        wait_until_ready(process, 2)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert "starting the ranks again" not in output
    assert process.returncode == 0


def test_who_lost_a_peer_is_not_the_cause() -> None:
    code, output, _ = run("follows_a_peer", 2)
    assert (code, output.rstrip().splitlines()[-1]) == (128 + signal.SIGKILL, "[rank 1] died of SIGKILL")


def test_slurms_warning_is_a_wish_to_stop() -> None:
    with running("steps_until_told", 2) as process:
        wait_until_ready(process, 2)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    assert "finished 1" in output


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
