"""Token shards in Megatron's format: ``.bin`` is the tokens end to end, ``.idx`` where each document begins.

``.idx``, little endian: the 9 bytes ``MMIDIDX\\0\\0``, u64 version 1, u8 code of the token type, u64 number
of sequences S, u64 number of document bounds D, then i32 lengths[S] in tokens, i64 offsets[S] in bytes, i64
bounds[D] in sequences. Here each document is one sequence, so D = S + 1.

Shape suffix: N tokens.
"""

import struct
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import FileEntry, Shard, write_file

Tokens = npt.NDArray[np.integer[Any]]

MAX_SHARD_TOKENS = 1 << 27  # a shard waits in memory until it is full
REMAKE = "copy the folder again, or remove it and prepare anew"

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type tokens are stored in: uint16 where the vocabulary is below 65,536, else int32."""
    return np.dtype("<u2" if vocab_size < 65536 else "<i4")


class ShardWriter:
    """Writes the documents of one split as ``<split>-00000.bin/.idx``, ``<split>-00001.bin/.idx`` and so on.

    A new shard begins where ``max_tokens`` would be exceeded. Nothing is complete before ``finish``.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype[Any], max_tokens: int = MAX_SHARD_TOKENS
    ) -> None:
        self._folder, self._split, self._dtype, self._max_tokens = folder, split, dtype, max_tokens
        self._shards: list[Shard] = []
        self._lengths: list[int] = []
        self._pending = bytearray()
        self._tokens = 0

    def add(self, tokens_N: Tokens) -> None:
        """Append one document."""
        if self._lengths and self._tokens + len(tokens_N) > self._max_tokens:
            self._write_shard()
        self._pending += tokens_N.astype(self._dtype).tobytes()
        self._lengths.append(len(tokens_N))
        self._tokens += len(tokens_N)

    def finish(self) -> tuple[Shard, ...]:
        """Write what is left; the shards of this split."""
        if self._lengths:
            self._write_shard()
        return tuple(self._shards)

    def _write_shard(self) -> None:
        stem = f"{self._split}-{len(self._shards):05d}"
        lengths = np.array(self._lengths, "<i4")
        bounds = np.arange(len(lengths) + 1, dtype="<i8")
        offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * self._dtype.itemsize
        code = next(code for code, name in _DTYPES.items() if np.dtype(name) == self._dtype)
        header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(bounds))
        index = b"".join((header, lengths.tobytes(), offsets.astype("<i8").tobytes(), bounds.tobytes()))
        tokens_file = write_file(self._folder / f"{stem}.bin", self._pending)
        index_file = write_file(self._folder / f"{stem}.idx", index)
        self._shards.append(Shard(self._split, self._tokens, len(lengths), tokens_file, index_file))
        self._lengths, self._pending, self._tokens = [], bytearray(), 0


def check_size(folder: Path, entry: FileEntry) -> None:
    """Raise a DataError unless the file of ``entry`` is there with the size it should have."""
    path = folder / entry.name
    if not path.is_file():
        raise DataError(f"a file of the manifest is missing (expected {entry.size} bytes)", str(path), REMAKE)
    found = path.stat().st_size
    if found != entry.size:
        raise DataError(
            f"the file has the wrong size: expected {entry.size} bytes, found {found}", str(path), REMAKE
        )


def read_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int32]]:
    """Token type, and length in tokens of each sequence, of a Megatron ``.idx``.

    Raises:
        DataError: it is none, or it is cut short.
    """
    content = path.read_bytes()
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise DataError("this is not a Megatron index: the magic bytes are missing", str(path), REMAKE)
    _, version, code, sequences, bounds = _HEADER.unpack_from(content)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"unknown index version {version} or token type {code}", str(path), REMAKE)
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if len(content) != expected:
        what = f"the index has the wrong size: expected {expected} bytes, found {len(content)}"
        raise DataError(what, str(path), REMAKE)
    return np.dtype(_DTYPES[code]), np.frombuffer(content, "<i4", sequences, _HEADER.size)


def open_shard(folder: Path, shard: Shard) -> Tokens:
    """The tokens of ``shard``, memory-mapped, once its files' sizes and its index are found to agree."""
    for entry in (shard.bin, shard.idx):
        check_size(folder, entry)
    dtype, lengths = read_index(folder / shard.idx.name)
    if (lengths < 0).any():
        what = f"document {int((lengths < 0).argmax())} has a negative length"
        raise DataError(what, str(folder / shard.idx.name), REMAKE)
    tokens = int(lengths.sum(dtype=np.int64))
    if (tokens, tokens * dtype.itemsize, len(lengths)) != (shard.tokens, shard.bin.size, shard.documents):
        what = (
            f"the index counts {tokens} tokens of {dtype.name} in {len(lengths)} documents, "
            f"the manifest {shard.tokens} in {shard.documents} and {shard.bin.size} bytes"
        )
        raise DataError(what, str(folder / shard.idx.name), REMAKE)
    return np.memmap(folder / shard.bin.name, dtype, mode="r")


class TokenStream:
    """Shards of one split as one array of tokens, read where it is asked for."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        self._names = [str(folder / shard.bin.name) for shard in shards]
        self._parts = [open_shard(folder, shard) for shard in shards]
        self._ends = list(accumulate(shard.tokens for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read_into(self, tokens_N: npt.NDArray[np.int64], start: int) -> None:
        """Fill ``tokens_N`` with tokens [start, start + N) of the stream, across shards if need be."""
        if not 0 <= start <= len(self) - len(tokens_N):
            raise IndexError(
                f"tokens [{start}, {start + len(tokens_N)}) are outside of a stream of {len(self)}"
            )
        done = 0
        while done < len(tokens_N):
            part = bisect_right(self._ends, start + done)
            offset = start + done - (self._ends[part] - len(self._parts[part]))
            piece = self._parts[part][offset : offset + len(tokens_N) - done]
            tokens_N[done : done + len(piece)] = piece
            done += len(piece)

    def locate(self, position: int) -> str:
        """File and token offset of a position of the stream, for error messages."""
        part = bisect_right(self._ends, position)
        return f"{self._names[part]}, token {position - (self._ends[part] - len(self._parts[part]))}"
