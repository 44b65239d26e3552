"""manifest.json: what makes a folder of files a checkpoint. Written last, so a folder that has it is
complete.

It lists every other file with its size and xxh3_128, and carries a checksum of itself.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from deepseek_train.checkpoint.agree import CheckpointError

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    step: int
    facts: dict[str, Any]
    files: dict[str, FileRecord]  # every file of the folder but the manifest


def measure(path: Path) -> FileRecord:
    """Size and checksum of a file as it is on disk; reads all of it."""
    with path.open("rb") as stream:
        return FileRecord(
            os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
        )


def verify(folder: Path, name: str, record: FileRecord) -> None:
    """Raises CheckpointError, naming file, expected and found, unless the file is what the manifest says."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the manifest expects {record.bytes} bytes")
    size = path.stat().st_size  # first: says more than a checksum, and costs nothing
    if size != record.bytes:
        raise CheckpointError(f"{path} has {size} bytes, the manifest expects {record.bytes}")
    found = measure(path).xxh3_128
    if found != record.xxh3_128:
        raise CheckpointError(
            f"{path} is damaged: its xxh3_128 is {found}, the manifest expects {record.xxh3_128}"
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and fsync the manifest, then the folder."""
    content = {"format": FORMAT, **asdict(manifest)}
    with (folder / NAME).open("w") as stream:
        json.dump(content | {"xxh3_128": _checksum(content)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError when there is none, or it is damaged, or of another format."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read, so {folder} is no checkpoint: {error}") from error
    if not isinstance(content, dict) or content.pop("xxh3_128", None) != _checksum(content):
        raise CheckpointError(f"{path} is damaged or was edited: its checksum is not that of its content")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this version reads format {FORMAT}")
    files = {name: FileRecord(**record) for name, record in content["files"].items()}
    return Manifest(content["step"], content["facts"], files)


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
