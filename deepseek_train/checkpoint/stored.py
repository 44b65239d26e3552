"""A checkpoint as one process reads it, without ranks: for exports, reports and moves."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_train.checkpoint.errors import CheckpointError, CheckpointUnreadable
from deepseek_train.checkpoint.finder import candidates
from deepseek_train.checkpoint.index import StoredTensor
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.store import check_files, read_index
from deepseek_train.checkpoint.tensor_file import read_range

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredCheckpoint:
    """What a verified checkpoint holds."""

    path: Place
    step: int
    facts: dict[str, Any]
    tensors: Mapping[str, StoredTensor]

    @staticmethod
    def open(path: Place) -> "StoredCheckpoint":
        """Reads and verifies every file. Raises CheckpointError that names what is damaged."""
        manifest = check_files(path, 0, 1)
        return StoredCheckpoint(path, manifest.step, manifest.facts, read_index(path, manifest))

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements [start, start + length) of a tensor, flat, in the stored type. Raises CheckpointError where it has
        no such elements."""
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path} holds no {name!r}")
        end = stored.total if length is None else start + length
        if not 0 <= start <= end <= stored.total:
            raise CheckpointError(
                f"{name!r} of {self.path} has {stored.total} elements, not [{start}, {end})"
            )
        found = torch.empty(end - start, dtype=stored.dtype)
        for low, high, file, offset in stored.ranges(start, end):
            with (self.path / file).open("rb") as stream:
                read_range(stream, offset, found[low - start : high - start], str(self.path / file))
        return found


def newest_whole(place: Place) -> StoredCheckpoint:
    """The checkpoint ``place``, or the newest one there, or of the run it is, all of whose files are right. Damaged
    ones before it are named in warnings, and left as they are. Raises CheckpointError; where there is no choice, with
    the only one's damage; CheckpointUnreadable where the disk does not say which are whole."""
    found = candidates(place)
    for one in found[:-1]:
        try:
            return StoredCheckpoint.open(one.path)
        except CheckpointUnreadable:
            raise
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    return StoredCheckpoint.open(found[-1].path)
