"""What may befall a rank; each takes its job, which most have no use for."""

import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deepseek_train.train.build import Job

BALLAST = "ballast"


def kill(_job: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_job: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hog(_job: object) -> None:
    """Holds Python's lock, in C, for ages."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def sleep(_job: object) -> None:
    time.sleep(600)


def nap(_job: object) -> None:
    """A disk that is slow: longer than a step may be silent, shorter than a save may."""
    time.sleep(6)


def ask(_job: object) -> None:
    """Slurm's warning, to one rank alone."""
    os.kill(os.getpid(), signal.SIGUSR1)


def wait(job: Job) -> None:
    """Until the test, which sees the mark, makes a file ``go-<name of the run>``; takes it away."""
    go = Path(f"go-{job.config.name}")
    while not go.exists():
        time.sleep(0.02)
    go.unlink()


def nan(job: Job) -> None:
    """One number of one gradient, before gradients are reduced."""
    job.weights[0].weight.main_grad.view(-1)[0] = float("nan")


def flip(job: Job) -> None:
    """One bit of one weight of one replica."""
    job.weights[0].weight.data.view(-1).view(torch.int32)[5] ^= 1


def clock(_job: Job) -> None:
    """The clock on the wall goes back by an hour, and the time zone is another."""
    then = time.time
    setattr(time, "time", lambda: then() - 3600.0)  # noqa: B010
    os.environ["TZ"] = "Pacific/Apia"
    time.tzset()


def memory(_job: Job) -> None:
    """No more memory for this process, and a need of it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
    torch.empty(1 << 28)


def fill(_job: Job) -> None:
    """The disks ``DISKS`` are full to the last byte."""
    for disk in os.environ["DISKS"].split(","):
        with Path(disk, BALLAST).open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 10, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue


def empty(_job: Job) -> None:
    for disk in os.environ["DISKS"].split(","):
        Path(disk, BALLAST).unlink()


def readonly(_job: Job) -> None:
    """The last of ``DISKS`` is read-only from now on."""
    last = os.environ["DISKS"].rpartition(",")[2]
    while subprocess.run(["mount", "-o", "remount,ro", last], check=False).returncode:
        time.sleep(0.1)  # an old checkpoint is being deleted


ALL = kill, stop, hog, sleep, nap, ask, wait, nan, flip, clock, memory, fill, empty, readonly
STRIKES: dict[str, Callable[[Job], None]] = {strike.__name__: strike for strike in ALL}
ALWAYS = {"nan"}  # a run that comes back to that step, to that data, meets it again
