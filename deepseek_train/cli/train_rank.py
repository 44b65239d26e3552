"""One rank of ``deepseek-train``: what the command's light half calls once the configuration is known to be sound."""

import os
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from deepseek_train.checkpoint import CheckpointError
from deepseek_train.cli.compose import compose_config
from deepseek_train.data.errors import DataError
from deepseek_train.parallel.rendezvous import RendezvousError, join
from deepseek_train.train.begin import NoGoodCheckpoint
from deepseek_train.train.build import build
from deepseek_train.train.folder import open_folder
from deepseek_train.train.guard import GuardError
from deepseek_train.train.loop import train
from deepseek_train.train.preflight import resolve_layout
from deepseek_train.train.replicas import ReplicaError

# Beside 2, for a launcher that starts runs again: after 5 it may do so at once, after the others somebody has to look.
EXIT_CODES: dict[type[Exception], int] = {NoGoodCheckpoint: 3, GuardError: 4, ReplicaError: 5}


def rank_main(argv: list[str]) -> int:
    """Joins the other ranks and trains; returns the exit code."""
    # torch 2.13 renames collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    config = compose_config(argv)
    # The command hides GPUs from runs that are to use CPUs (cli.train.choose_device).
    cluster, device = config.cluster, _device()
    if device == "cpu":
        torch.set_num_threads(cluster.threads_per_rank)
    layout = resolve_layout(config, int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None)
    try:
        place = join(device, layout.world, cluster.rendezvous_seconds, cluster.timeout_seconds)
        if place.rank == 0:
            open_folder(config)
        dist.barrier()
        train(build(config, layout, place), Path(config.run_dir))
    except (RendezvousError, DataError, CheckpointError, GuardError, ReplicaError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        return EXIT_CODES.get(type(error), 2)
    # Not after an exception: with collectives under way it could wait for ever and hide the traceback.
    dist.destroy_process_group()
    return 0


def _device() -> Literal["cpu", "cuda"]:
    return "cuda" if torch.cuda.is_available() else "cpu"
