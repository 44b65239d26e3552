"""Posts a rank's watchdog: where its node's board lies, and that all ranks of the node look at the same one."""

import os
import tempfile
import uuid
from pathlib import Path

import torch.distributed as dist

from deepseek_train.config.cluster import ClusterConfig
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.train.folder import HANGS
from deepseek_train.watch.board import Board
from deepseek_train.watch.watchdog import Rules, Watchdog

BOARD_VARIABLE = "DEEPSEEK_TRAIN_BOARD"  # the local launcher's, which reads it too


def post_watchdog(config: ClusterConfig, place: Place, run_dir: Path) -> Watchdog | None:
    """This rank's watchdog, watching; None where none is wanted (collective)."""
    if not config.watchdog.enabled:
        return None
    names = [uuid.uuid4().hex]
    dist.broadcast_object_list(names, src=0)  # of this start: an earlier one's ranks are not ours
    told = os.environ.get(BOARD_VARIABLE)
    path = Path(told) if told else _node_memory() / f"deepseek_train_{names[0]}"
    # A collective that gave up first would name nobody.
    rules = Rules(config.watchdog.hang_seconds, 0.9 * config.timeout_seconds)
    watchdog = Watchdog(Board(path, place.world_size), place.rank, place.world_size, rules, run_dir / HANGS)
    dist.barrier()
    if not told:
        path.unlink(
            missing_ok=True
        )  # all have it open, and nobody else will: nothing is left however they end
    watchdog.start()
    return watchdog


def _node_memory() -> Path:
    """A folder that all ranks of a node, and no others, see."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
