"""A safetensors file written tensor by tensor: what it will hold is known before, so it can begin with its header.

The format: the header's length (64 bits, little-endian), the header (JSON: type, shape and place of each tensor), then
the tensors' bytes without a gap. As the library does it, wide types come first and the data begins at a multiple of 8,
so that every tensor is aligned where the file is mapped into memory.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from deepseek_train.checkpoint.index import NAMES


@dataclass(frozen=True)
class Header:
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


def write_stream(path: Path, headers: Sequence[Header], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write and fsync a file with these ``headers``; ``tensors`` gives each once, in any order.

    Raises ValueError where a tensor is not what its header says, comes twice or not at all; OSError.
    """
    by_name = {header.name: header for header in headers}
    places, end = {}, 0
    for header in sorted(headers, key=lambda header: -header.dtype.itemsize):
        places[header.name] = end, end + header.bytes
        end += header.bytes
    content = {
        h.name: {"dtype": NAMES[h.dtype], "shape": list(h.shape), "data_offsets": list(places[h.name])}
        for h in headers
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **content}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        stream.truncate(start + end)
        for name, tensor in tensors:
            header = by_name.pop(name)
            if (tensor.dtype, tuple(tensor.shape)) != (header.dtype, header.shape):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {header}")
            stream.seek(start + places[name][0])
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        if by_name:
            raise ValueError(f"announced, but not written: {', '.join(by_name)}")
        stream.flush()
        os.fsync(stream.fileno())
