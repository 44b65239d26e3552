"""Checkpoints: ``save``, ``newest``, ``load``. All or nothing, verified, and free of any layout."""

from deepseek_train.checkpoint.agree import CheckpointError
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.store import load, newest, save

__all__ = ["CheckpointError", "Piece", "Snapshot", "load", "newest", "save"]
