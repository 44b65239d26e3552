"""One text file to documents, by its suffix.

``.py`` and ``.md``: one document a file. ``.txt``: pieces of about 16 kB, cut between paragraphs, so that one
long file still fills both splits. ``.jsonl``: the field ``text`` of each line. Each may end in ``.gz`` or
``.zst`` besides.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from fsspec.compression import compr
from fsspec.spec import AbstractFileSystem

from deepseek_train.data.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_PIECE_BYTES = 16_384


@dataclass(frozen=True)
class Document:
    """One text. ``name`` is unique in its corpus; what precedes ``::`` is its family."""

    name: str
    text: str

    @property
    def family(self) -> str:
        """Documents of one family (a file and the docstrings in it) never fall into different splits."""
        return self.name.split("::")[0]


def split_suffix(name: str) -> tuple[str, str | None]:
    """``(suffix, compression)`` of a file name: ``a.txt.gz`` gives ``(".txt", "gzip")``."""
    path = PurePosixPath(name)
    compression = COMPRESSIONS.get(path.suffix)
    if compression is not None:
        path = path.with_suffix("")
    return path.suffix, compression


def read_documents(name: str, system: AbstractFileSystem, path: str) -> Iterator[Document]:
    """Documents of the file at ``path`` of an fsspec file system, named after ``name``.

    Raises:
        DataError: not UTF-8, not JSON where it should be, unreadable, or compressed in a way not installed
        here.
    """
    suffix, compression = split_suffix(name)
    url = system.unstrip_protocol(path)
    if compression is not None and compression not in compr:
        raise DataError(
            f"reading {compression} needs a package that is not installed",
            url,
            "pip install 'deepseek-train[zstd]'",
        )
    done = 0  # documents
    try:
        with system.open(path, "rb", compression=compression) as opened:
            stream = opened if compression is None else io.BufferedReader(opened)  # lines, for zstandard too
            match suffix:
                case ".jsonl":
                    texts = _json_texts(stream, url)
                case ".txt":
                    texts = _pieces(stream)
                case _:
                    yield Document(name, stream.read().decode("utf-8-sig"))
                    return
            for text in texts:
                yield Document(f"{name}#{done}", text)
                done += 1
    except DataError:
        raise
    except UnicodeDecodeError as error:
        where = f"{url}, document {done}"
        raise DataError(f"the text is not UTF-8: {error}", where, "convert or remove the file") from error
    except Exception as error:  # every file system and every decompressor has errors of its own
        what = f"the file cannot be read: {error}"
        raise DataError(what, url, "check that it is there, whole, and what its suffix says") from error


def _json_texts(stream: BinaryIO, url: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{url}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"the line is not JSON: {error}", where, "one JSON object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError("the line has no string 'text'", where, 'write {"text": "..."} on each line')
        yield row["text"].encode("utf-8", "replace").decode()  # lone surrogates are no text


def _pieces(stream: BinaryIO) -> Iterator[str]:
    """Text cut at the first blank line after 16 kB, or at any line end after twice that."""
    lines: list[bytes] = []
    size = 0
    for line in stream:
        lines.append(line)
        size += len(line)
        if size >= 2 * _PIECE_BYTES or (size >= _PIECE_BYTES and not line.strip()):
            yield b"".join(lines).decode()
            lines, size = [], 0
    if lines:
        yield b"".join(lines).decode()
