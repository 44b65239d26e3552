"""Checkpoints: ``Saver`` or ``save``, ``newest_good``, ``load``. All or nothing, verified, and free of any layout."""

from deepseek_train.checkpoint.agree import CheckpointError
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.retention import Retention
from deepseek_train.checkpoint.saver import Saver
from deepseek_train.checkpoint.store import load, newest, newest_good, save

__all__ = [
    "CheckpointError",
    "Piece",
    "Retention",
    "Saver",
    "Snapshot",
    "load",
    "newest",
    "newest_good",
    "save",
]
