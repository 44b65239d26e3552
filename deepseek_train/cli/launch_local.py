"""Start the ranks of a run on this machine, without torchrun: forked from one preloaded process, no port.

The heavy packages are imported once, in a server process which then forks every rank, so that eight ranks on
a laptop start in the time of one. Signals take one road: a terminal's Ctrl-C reaches every process, but only
the launcher listens to it (SIGINT is blocked in ranks, in their server and in whatever they start). It asks
the ranks by SIGTERM to finish their step; a second signal ends them at once. A rank whose launcher vanished
asks itself. Ranks that failed are started again, if so asked.
"""

import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from deepseek_train.cli.local_rank import read_errors, run_rank
from deepseek_train.cli.verdict import verdict
from deepseek_train.config.exit_codes import FINAL, ExitCode
from deepseek_train.watch.say import say

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.1  # how late the launcher may notice a signal


def launch(
    target: str,
    argv: Sequence[str],
    world_size: int,
    *,
    preload: Sequence[str] = (),
    threads_per_rank: int = 1,
    grace_seconds: float = 5.0,
    max_restarts: int = 0,
    again: Sequence[str] | None = None,
) -> int:
    """Run ``target(argv)`` on ``world_size`` local ranks and return the exit code of the whole.

    ``target`` names a function ("package.module:function") that takes a list of strings and returns an exit
    code or None. It finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, OMP_NUM_THREADS and
    DEEPSEEK_TRAIN_STORE (see ``parallel.rendezvous``) in its environment, and finishes its step at SIGTERM.
    ``preload`` lists modules to import before the fork; they must start neither threads nor CUDA.

    When a rank fails, the others get SIGTERM after ``grace_seconds`` and SIGKILL after as many again; the
    code is that of the rank that failed first, and its traceback the last thing printed. 128 + the signal's
    number when the ranks had to be ended by a signal.

    Up to ``max_restarts`` times the ranks are then started again, with the arguments ``again`` (None: the same), unless
    a signal came or the code says that it would be in vain (``config.exit_codes.FINAL``).
    """
    with _signals() as received:
        _start_server(preload, threads_per_rank)
        for restart in range(max_restarts + 1):
            if restart:
                say(f"starting the ranks again ({restart} of {max_restarts})")
                argv = argv if again is None else again
            code = _launch_once(target, argv, world_size, grace_seconds, received)
            if code in FINAL or received:
                break
        return code


def _launch_once(
    target: str, argv: Sequence[str], world_size: int, grace_seconds: float, received: list[int]
) -> int:
    with tempfile.TemporaryDirectory(prefix="deepseek_train_") as folder:
        context = multiprocessing.get_context("forkserver")
        processes = []
        for rank in range(world_size):
            if not received:
                arguments = (target, list(argv), rank, world_size, folder, os.getcwd())
                processes.append(context.Process(target=run_rank, args=arguments))
                processes[-1].start()
        try:
            complete = len(processes) == world_size  # else a signal came first, and nobody has begun
            failed = _wait(processes, received, grace_seconds, Path(folder)) if complete else []
        finally:
            _send(processes, signal.SIGKILL)
            for process in processes:
                process.join()
        codes = [process.exitcode or 0 for process in processes]
        return verdict(codes, failed, received, read_errors(Path(folder)), Path(folder))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The stop signals received so far, by number."""
    received: list[int] = []
    before = {s: signal.signal(s, lambda signum, _: received.append(signum)) for s in STOP_SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _start_server(preload: Sequence[str], threads_per_rank: int) -> None:
    settings = {
        "OMP_NUM_THREADS": str(threads_per_rank),  # read when torch is imported, so before the fork
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for GPUs must not start CUDA before the fork
    }
    before = {key: os.environ.get(key) for key in settings}
    multiprocessing.resource_tracker.ensure_running()  # its start unblocks signals, so it goes first
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the server inherits this for good
    os.environ.update(settings)
    multiprocessing.set_forkserver_preload([run_rank.__module__, *preload])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _wait(processes: list[ForkServerProcess], received: list[int], grace: float, folder: Path) -> list[int]:
    """Wait until no rank is alive, ending them where due; returns the ranks that failed, the cause first."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    failed: list[tuple[float, int]] = []  # when, which
    due: list[tuple[float, int]] = []  # signals to be sent: when, which
    sent: list[int] = []
    obeyed = 0  # signals of the user's
    while running:
        for sentinel in multiprocessing.connection.wait(list(running), POLL_SECONDS):
            rank, now = running.pop(sentinel), time.monotonic()  # type: ignore[arg-type]
            processes[rank].join()
            if processes[rank].exitcode == 0:
                continue
            error = read_errors(folder).get(rank)
            if not sent or (error and signal.SIGKILL not in sent):  # else it only did as it was told
                # A crash is the cause, though its peers have written that they lost it before we notice.
                follows = processes[rank].exitcode == ExitCode.PEER_LOST
                failed.append((math.inf if follows else error.when if error else 0.0, rank))
            if not due and signal.SIGKILL not in sent:
                due = [(now + grace, signal.SIGTERM), (now + 2 * grace, signal.SIGKILL)]
                say(f"rank {rank} ended early, ending the others")
        if len(received) > obeyed:
            due = [(0.0, signal.SIGKILL if obeyed or len(received) > 1 else signal.SIGTERM)]
            obeyed = len(received)
            if due[0][1] == signal.SIGTERM:
                say("\nstopping after this step; once more to end at once")
        while due and time.monotonic() >= due[0][0]:
            sent.append(due.pop(0)[1])
            _send(processes, sent[-1])
    return [rank for _, rank in sorted(failed)]


def _send(processes: list[ForkServerProcess], signum: int) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signum)
