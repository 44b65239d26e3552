"""A checkpoint's tensors in other files, bit for bit."""

from collections.abc import Iterator

from torch import Tensor

from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.folders import committed
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.stored import StoredCheckpoint

_ELEMENTS = 16 << 20  # held at a time


def rewrite(stored: StoredCheckpoint, root: Place, files: int) -> Place:
    """Writes a verified checkpoint into ``root`` as about ``files`` files of equal size; returns its folder. Raises
    CheckpointError."""
    for found in committed(root):
        if found.step == stored.step:
            raise CheckpointError(
                f"{found.path} is a checkpoint of step {stored.step} already: choose another target"
            )
    planned = [Planned(t.name, t.dtype, t.total) for t in stored.tensors.values()]
    size = sum(one.total * one.dtype.itemsize for one in planned)

    def produce(name: str, start: int, end: int) -> Iterator[Tensor]:
        for at in range(start, end, _ELEMENTS):
            yield stored.read(name, at, min(_ELEMENTS, end - at))

    return write_alone(
        root, stored.step, planned, produce, stored.facts, file_bytes=max(1, -(-size // files))
    )
