"""Ranks for tests: forked in milliseconds from a clean process, watched, never left behind.

pytest's own process has run tensor code, and a fork of it can hang in its first matrix product. So ranks are
forked from a server that has imported everything and run nothing (``tests.harness.preload``); it starts at
the first use (some seconds) and ends with pytest.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.harness.rank import STACK_SIGNAL, Job, rank_main
from tests.harness.report import Failure, RanksFailed, died, failure_report

GRACE_SECONDS = 3.0  # what the others get after the first rank failed
STACK_SECONDS = 0.5  # what a hung rank gets to write its stack


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, group: bool = True
) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` on ``world_size`` gloo ranks and return its results, by rank.

    ``fn`` is a module-level function; arguments and results are picklable (tensors are). In a rank: one
    thread, environment and warning filters as here, ``torch.empty`` gives NaN, a seed made of the test's name
    and the rank. ``group=False`` leaves torch.distributed to ``fn``.

    Raises ``RanksFailed`` with the traceback of every rank, the first cause first. A rank that hangs is ended
    after ``timeout`` seconds, or 3 seconds after another one failed, and reported with the stack it hung in.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        home = Path(folder)
        # gloo's own patience is longer than ours: ours knows who hangs where
        (home / "job").write_bytes(pickle.dumps(_job(fn, world_size, args, timeout + 30 if group else None)))
        _start_server()
        context = multiprocessing.get_context("forkserver")
        processes = [context.Process(target=rank_main, args=(folder, rank)) for rank in range(world_size)]
        try:
            for process in processes:
                process.start()
            failures = _watch(processes, home, timeout)
        finally:
            for process in processes:
                _end(process)
        if failures:
            raise RanksFailed(failure_report(failures, world_size))
        for rank in range(world_size):
            sys.stdout.write(_read(home / f"{rank}.log"))
        return [pickle.loads((home / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _job(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], group_timeout: float | None) -> Job:
    name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return Job(fn, world_size, args, name, group_timeout, dict(os.environ), list(warnings.filters))


def _start_server() -> None:
    """Start the process that ranks are forked from, unless it runs already."""
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # where the server finds its preload
        "OMP_NUM_THREADS": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for GPUs must not start CUDA before the fork
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    multiprocessing.set_forkserver_preload(["tests.harness.preload", "tests.harness.rank"])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _watch(processes: list[ForkServerProcess], home: Path, timeout: float) -> list[Failure]:
    """Wait for every rank, or until patience ends; returns the failures in no order."""
    ranks = {process.sentinel: rank for rank, process in enumerate(processes)}
    deadline = time.monotonic() + timeout
    failures = []
    while ranks:
        left = deadline - time.monotonic()
        ended = multiprocessing.connection.wait(list(ranks), max(left, 0))
        for sentinel in ended:
            rank = ranks.pop(sentinel)  # type: ignore[arg-type]
            processes[rank].join()
            if processes[rank].exitcode != 0:
                failures.append(_ended_badly(rank, processes[rank].exitcode or 0, home))
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not ended and left <= 0:
            waited = f"after {timeout:g} s" if not failures else "while another rank failed"
            return failures + _stacks({rank: processes[rank] for rank in ranks.values()}, home, waited)
    return failures


def _ended_badly(rank: int, exit_code: int, home: Path) -> Failure:
    log, error = _read(home / f"{rank}.log"), home / f"{rank}.error"
    if error.exists():
        when, trace = pickle.loads(error.read_bytes())
        return Failure(rank, "raised", trace, log, when)
    # A crash is the cause, not a follower, but is noticed only after its peers have written their tracebacks.
    return Failure(rank, died(exit_code), "", log, when=0.0)


def _stacks(hung: dict[int, ForkServerProcess], home: Path, waited: str) -> list[Failure]:
    """Ask ranks that are still alive where they stand."""
    for process in hung.values():
        if process.is_alive():
            os.kill(process.pid or 0, STACK_SIGNAL)
    time.sleep(STACK_SECONDS)
    headline = f"hung, ended {waited}; it stood in (innermost call first)"
    return [
        Failure(rank, headline, _read(home / f"{rank}.stack"), _read(home / f"{rank}.log"), time.monotonic())
        for rank in hung
    ]


def _end(process: ForkServerProcess) -> None:
    if process.pid is None:
        return
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    process.close()


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
