"""tensors.json: where the elements of every logical tensor lie in a checkpoint's files.

JSON, checked entry by entry when it is read: nothing is executed, nothing is allocated by what it claims.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.manifest import FileRecord
from deepseek_train.config.untrusted import is_count

NAME = "tensors.json"

# Types by their names in safetensors files.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Chunk:
    """Elements [start, start + length) of a logical tensor, from byte ``offset`` of ``file`` on."""

    start: int
    length: int
    file: str
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor, flat. Its chunks follow one another and hold each element once."""

    name: str
    dtype: torch.dtype
    total: int  # elements
    chunks: tuple[Chunk, ...]

    def ranges(self, start: int, end: int) -> Iterator[tuple[int, int, str, int]]:
        """Where elements [start, end) are: (low, high, file, byte offset) of each stretch."""
        first = bisect_right(self.chunks, start, key=lambda chunk: chunk.end)
        for chunk in islice(self.chunks, first, None):
            low, high = max(start, chunk.start), min(end, chunk.end)
            if low >= high:
                return
            yield low, high, chunk.file, chunk.offset + (low - chunk.start) * self.dtype.itemsize


def encode(tensors: Sequence[StoredTensor]) -> bytes:
    """The file's content."""
    files = sorted({chunk.file for tensor in tensors for chunk in tensor.chunks})
    number = {file: i for i, file in enumerate(files)}
    table = {
        tensor.name: {
            "dtype": NAMES[tensor.dtype],
            "total": tensor.total,
            "chunks": [[c.start, c.length, number[c.file], c.offset] for c in tensor.chunks],
        }
        for tensor in tensors
    }
    return json.dumps({"files": files, "tensors": table}, separators=(",", ":")).encode()


def decode(content: bytes, where: str, files: Mapping[str, FileRecord]) -> dict[str, StoredTensor]:
    """What ``encode`` wrote, by name. Raises CheckpointError where it does not fit itself or ``files``, those of the
    manifest."""
    try:
        index = json.loads(content)
        names = index["files"]
        for name in names:
            if name not in files:
                raise CheckpointError(f"{where} speaks of {name!r}, which the manifest does not list")
        return {name: _tensor(name, entry, names, files) for name, entry in index["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{where} is no index of tensors: {type(error).__name__}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _tensor(name: str, entry: Any, names: list[str], files: Mapping[str, FileRecord]) -> StoredTensor:
    dtype, total = DTYPES[entry["dtype"]], entry["total"]
    chunks = tuple(
        Chunk(start, length, names[file], offset) for start, length, file, offset in entry["chunks"]
    )
    at = 0
    for chunk in chunks:
        if not all(map(is_count, (chunk.start, chunk.length, chunk.offset))) or chunk.start != at:
            raise CheckpointError(f"the chunks of {name!r} do not follow one another at element {at}")
        if chunk.offset + chunk.length * dtype.itemsize > files[chunk.file].bytes:
            raise CheckpointError(f"a chunk of {name!r} reaches beyond the end of {chunk.file!r}")
        at = chunk.end
    if not is_count(total) or at != total:
        raise CheckpointError(f"the chunks of {name!r} hold {at} elements of {total}")
    if total * dtype.itemsize > sum(record.bytes for record in files.values()):
        raise CheckpointError(f"{name!r} is larger than all files together: its chunks share bytes")
    return StoredTensor(name, dtype, total, chunks)
