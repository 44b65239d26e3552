"""The inside of one rank: joins its gloo group, runs the test's function, leaves its result in a file."""

import faulthandler
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from tests.poison import poison_empty, seed_everything

STACK_SIGNAL = signal.SIGUSR1  # asks a rank to write where it stands


@dataclass(frozen=True)
class Job:
    """What all ranks of one ``run_ranks`` share."""

    fn: Callable[..., Any]
    world_size: int
    args: tuple[Any, ...]
    seed_name: str
    group_timeout: float | None  # seconds, of gloo's own operations; None: no group is made
    environment: dict[str, str]
    warning_filters: list[Any]  # of Python's own warnings.filters


def rank_main(folder: str, rank: int) -> None:
    """Run ``folder/job`` as ``rank``; leaves ``{rank}.result`` or ``{rank}.error``, and ``{rank}.log``."""
    torch.set_num_threads(1)  # first: an OpenMP pool does not survive a fork
    home = Path(folder)
    code = 1
    try:
        _own_output(home, rank)
        job: Job = pickle.loads((home / "job").read_bytes())
        _prepare(job, rank)
        if job.group_timeout is not None:
            store = FileStore(str(home / "store"), job.world_size)
            patience = timedelta(seconds=job.group_timeout)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=job.world_size, timeout=patience
            )
        result = job.fn(rank, job.world_size, *job.args)
        _write(home / f"{rank}.result", pickle.dumps(result))
        if dist.is_initialized():
            dist.barrier()  # nobody tears down its connections while another still talks
            dist.destroy_process_group()
        code = 0
    except BaseException:  # the parent reraises it
        _write(home / f"{rank}.error", pickle.dumps((time.monotonic(), traceback.format_exc())))
    finally:
        os._exit(code)


def _own_output(home: Path, rank: int) -> None:
    log = os.open(home / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(STACK_SIGNAL, file=(home / f"{rank}.stack").open("w"), all_threads=True)
    faulthandler.enable()  # SIGSEGV and SIGABRT leave their stack in the log


def _prepare(job: Job, rank: int) -> None:
    os.environ.clear()
    os.environ.update(job.environment)
    warnings.resetwarnings()
    warnings.filters.extend(job.warning_filters)  # type: ignore[attr-defined]
    poison_empty(torch)
    seed_everything(torch, job.seed_name, rank)


def _write(path: Path, content: bytes) -> None:
    """Write at once, so that the parent never reads half a file."""
    draft = path.with_suffix(".draft")
    draft.write_bytes(content)
    draft.rename(path)
