"""One rank of ``deepseek-train``: what the command's light half calls once the configuration is known to be sound.

Whatever a rank would import at its first use is imported here, once, before local ranks are forked.
"""

import gc
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # which torch.autograd.backward asks whether two shapes are equal

from deepseek_kernels.machine import BackendUnavailable
from deepseek_train.checkpoint.errors import CheckpointError, StorageFailed
from deepseek_train.cli.compose import compose_config
from deepseek_train.cli.tell import tell
from deepseek_train.config.exit_codes import ExitCode
from deepseek_train.config.schema import RunConfig
from deepseek_train.config.storage import storage_failed
from deepseek_train.data.errors import DataError
from deepseek_train.monitor.streams import safe_streams
from deepseek_train.parallel.lost import lost_connection
from deepseek_train.parallel.rendezvous import Place, RendezvousError, join
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.train.agreement import RanksDiffer, agree
from deepseek_train.train.begin import NoGoodCheckpoint
from deepseek_train.train.build import build
from deepseek_train.train.fallbacks import fitting, resolve_layout
from deepseek_train.train.folder import RunFolderFailed, open_folder, run_folder_told
from deepseek_train.train.guard import GuardError
from deepseek_train.train.lock import RunFolderTaken, RunLock
from deepseek_train.train.loop import train
from deepseek_train.train.memory import memory_report, out_of_memory
from deepseek_train.train.replicas import ReplicaError
from deepseek_train.train.schedule_store import told_by_rank_0
from deepseek_train.train.watching import post_watchdog
from deepseek_train.watch.say import say
from deepseek_train.watch.watchdog import Watchdog

# Errors that say all there is to say, the same on every rank but for ``_OF_ONE``.
FORESEEN: dict[type[Exception], ExitCode] = {
    RendezvousError: ExitCode.USER_ERROR,
    RanksDiffer: ExitCode.USER_ERROR,
    RunFolderTaken: ExitCode.USER_ERROR,
    BackendUnavailable: ExitCode.USER_ERROR,
    DataError: ExitCode.USER_ERROR,
    CheckpointError: ExitCode.USER_ERROR,
    StorageFailed: ExitCode.STORAGE,
    RunFolderFailed: ExitCode.STORAGE,
    NoGoodCheckpoint: ExitCode.NO_CHECKPOINT,
    GuardError: ExitCode.GIVEN_UP,
    ReplicaError: ExitCode.REPLICAS_DIFFER,
}
_OF_ONE = (RendezvousError, DataError)


def rank_main(argv: list[str]) -> int:
    """Joins the other ranks and trains; returns the exit code."""
    gc.freeze()  # what has been imported is no garbage: DeepSpeed has it all looked through at every turn
    with safe_streams():
        return _run(argv)


def _run(argv: list[str]) -> int:
    # torch 2.13 renames collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    world_size = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    config = fitting(compose_config(argv), world_size)
    # The command hides GPUs from runs that are to use CPUs (cli.train.choose_device).
    cluster, device = config.cluster, _device()
    if device == "cpu":
        torch.set_num_threads(cluster.threads_per_rank)
    layout = resolve_layout(config, world_size)
    watchdog: Watchdog | None = None
    try:
        place = join(device, layout.world, cluster.rendezvous_seconds, cluster.timeout_seconds)
        agree(config)
        watchdog = post_watchdog(cluster, place, Path(config.run_dir))
        _train(config, layout, place, watchdog)
    except tuple(FORESEEN) as error:
        if isinstance(error, _OF_ONE) or os.environ.get("LOCAL_RANK", "0") == "0":
            tell(str(error))
        return _code(error)
    except Exception as error:
        if words := out_of_memory(error):
            rank = int(os.environ.get("RANK", "0"))
            seen = watchdog.where.seen(rank).place if watchdog else "the start"
            say(memory_report(config, rank, seen, words))
            return ExitCode.OUT_OF_MEMORY
        fault = watchdog.others_fault() if watchdog else None
        if fault is None and lost_connection(error):
            fault = f"rank {place.rank}: a peer is lost: {error}", ExitCode.PEER_LOST
        if fault is None:
            raise
        text, code = fault
        say(text)
        return code
    finally:
        if watchdog is not None:
            watchdog.close()
    # Not after an exception: with collectives under way it could wait for ever and hide the traceback.
    dist.destroy_process_group()
    return ExitCode.COMPLETE


def _train(config: RunConfig, layout: ParallelLayout, place: Place, watchdog: Watchdog | None) -> None:
    """Opens the run folder, locked, and trains."""
    folder = Path(config.run_dir)
    with ExitStack() as held:  # by rank 0 alone, who also tells the others if it cannot
        told_by_rank_0(lambda: _open(config, held))
        train(build(config, layout, place, watchdog.where if watchdog else None), folder)


def _open(config: RunConfig, held: ExitStack) -> None:
    with run_folder_told(Path(config.run_dir)):
        held.enter_context(RunLock(Path(config.run_dir)))
        open_folder(config)


def _code(error: Exception) -> ExitCode:
    if isinstance(error, DataError) and storage_failed(error):
        return ExitCode.STORAGE
    return next(FORESEEN[kind] for kind in type(error).__mro__ if kind in FORESEEN)


def _device() -> Literal["cpu", "cuda"]:
    return "cuda" if torch.cuda.is_available() else "cpu"
