"""A rank's file: flat tensors one after another in the format of safetensors, written and checksummed in one pass
and read by ranges, straight into the tensors' own memory.

The safetensors library reads these files (a test says so); it is not used because it writes from a copy of everything
and checksums nothing.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.index import NAMES
from deepseek_train.checkpoint.manifest import FileRecord
from deepseek_train.checkpoint.places import Place

_ALIGNMENT = 64  # bytes, of the first tensor
_BLOCK = 32 << 20  # bytes written at a time


@dataclass(frozen=True)
class Part:
    """What is known of a piece without its elements."""

    name: str
    start: int
    length: int
    total: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def bytes(self) -> int:
        return self.length * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """Where the parts of a file lie: ``offsets`` in bytes from its beginning, in the order of ``parts``."""

    parts: tuple[Part, ...]
    header: bytes
    offsets: tuple[int, ...]
    bytes: int


def layout_of(parts: Iterable[Part]) -> FileLayout:
    """The wider types first, so that each element is aligned to its own size; else in the given order."""
    ordered = tuple(sorted(parts, key=lambda part: -part.dtype.itemsize))
    table, at, starts = {}, 0, []
    for part in ordered:
        table[f"{part.name}@{part.start}"] = {
            "dtype": NAMES[part.dtype],
            "shape": [part.length],
            "data_offsets": [at, at + part.bytes],
        }
        starts.append(at)
        at += part.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(ordered, header, tuple(len(header) + start for start in starts), len(header) + at)


def write_tensor_file(path: Place, layout: FileLayout, tensors: Iterable[Tensor]) -> FileRecord:
    """Writes the parts' elements, flat CPU tensors in the order of ``layout.parts``, each whole or as several in a row
    (a part's end need not be a tensor's). Fsynced on a local disk. Raises ValueError where the bytes are not those of
    the layout."""
    digest, size = xxhash.xxh3_128(layout.header), len(layout.header)
    with path.open("wb") as stream:
        stream.write(layout.header)
        for tensor in tensors:
            content = tensor.detach().contiguous().view(torch.uint8).numpy().data
            for at in range(0, len(content), _BLOCK):
                digest.update(content[at : at + _BLOCK])
                stream.write(content[at : at + _BLOCK])
            size += len(content)
        if isinstance(path, Path):
            stream.flush()
            os.fsync(stream.fileno())
    if size != layout.bytes:
        raise ValueError(f"{path}: {size} bytes were given for a layout of {layout.bytes}")
    return FileRecord(size, digest.hexdigest())


def read_range(stream: BinaryIO, offset: int, into: Tensor, where: str) -> None:
    """Fills a flat contiguous tensor from ``offset`` on. Raises CheckpointError where the file, named ``where``,
    ends before."""
    home = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
    content = memoryview(home.detach().view(torch.uint8).numpy().data)
    stream.seek(offset)
    at = 0
    while at < len(content):
        count = stream.readinto(content[at:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{where} ended at byte {offset + at}, {len(content) - at} too early")
        at += count
    if home is not into:
        into.copy_(home)


def parts_at(file: str, layout: FileLayout) -> Sequence[tuple[Part, str, int]]:
    """(part, file, offset) of every part."""
    return [(part, file, offset) for part, offset in zip(layout.parts, layout.offsets, strict=True)]
