"""manifest.json: what makes a folder of files a checkpoint. Written last, so a folder that has it is
complete.

It lists every other file with its size and xxh3_128, and carries a checksum of itself. What is read is not
trusted: names cannot leave the folder, and counts are counts.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import xxhash

from deepseek_train.checkpoint.errors import CheckpointError, CheckpointUnreadable, reason
from deepseek_train.checkpoint.places import Place, fsync_folder, write_synced
from deepseek_train.config.untrusted import is_count, is_plain_name

FORMAT = 2
NAME = "manifest.json"
LARGEST = 64 << 20  # bytes of a manifest: 2048 ranks' files are half a megabyte
_BLOCK = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    step: int
    facts: dict[str, Any]
    files: dict[str, FileRecord]  # every file of the folder but the manifest


def record_of(content: bytes) -> FileRecord:
    """Of a file that is still in memory."""
    return FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))


def measure(stream: BinaryIO) -> FileRecord:
    """Size and checksum of what an open file holds; reads all of it."""
    digest, size = xxhash.xxh3_128(), 0
    while block := stream.read(_BLOCK):
        digest.update(block)
        size += len(block)
    return FileRecord(size, digest.hexdigest())


def verify(folder: Place, name: str, record: FileRecord) -> None:
    """Raises CheckpointError, naming file, expected and found, unless the file is what the manifest says;
    CheckpointUnreadable when the disk does not say."""
    path = folder / name
    try:
        size = path.stat().st_size  # first: says more than a checksum, and costs nothing
        if size != record.bytes:
            raise CheckpointError(f"{path} has {size} bytes, the manifest expects {record.bytes}")
        with path.open("rb") as stream:
            found = measure(stream).xxh3_128
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} is missing: the manifest expects {record.bytes} bytes") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != record.xxh3_128:
        raise CheckpointError(
            f"{path} is damaged: its xxh3_128 is {found}, the manifest expects {record.xxh3_128}"
        )


def write_manifest(folder: Place, manifest: Manifest) -> None:
    """Write and fsync the manifest, then the folder."""
    content = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps(content | {"xxh3_128": _checksum(content)}, indent=1)
    write_synced(folder / NAME, text.encode())
    fsync_folder(folder)


def read_manifest(folder: Place) -> Manifest:
    """Raises CheckpointError when there is none, or it is damaged, or of another format; CheckpointUnreadable when the
    disk does not say."""
    path = folder / NAME
    try:
        size = path.stat().st_size
        content = json.loads(path.read_bytes()) if size <= LARGEST else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read, so its folder is no checkpoint: {reason(error)}"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict) or content.pop("xxh3_128", None) != _checksum(content):
        raise CheckpointError(f"{path} is damaged or was edited: its checksum is not that of its content")
    if content.get("format") != FORMAT:
        raise CheckpointUnreadable(
            f"{path} has format {content.get('format')}, this version reads format {FORMAT}"
        )
    step, facts, files = (content.get(key) for key in ("step", "facts", "files"))
    if (
        not isinstance(step, int)
        or not is_count(step)
        or not isinstance(facts, dict)
        or not isinstance(files, dict)
    ):
        raise CheckpointError(f"{path} lacks a step, facts or files of the right kind")
    return Manifest(step, facts, {name: _record(path, name, value) for name, value in files.items()})


def _unreadable(path: Place, error: OSError) -> CheckpointUnreadable:
    return CheckpointUnreadable(f"{path} cannot be read: {reason(error)}. See to the disk, and try again.")


def _record(path: Place, name: str, value: object) -> FileRecord:
    if name == NAME or not is_plain_name(name):
        raise CheckpointError(f"{path} lists {name!r}, which is no plain name of a file beside it")
    if not isinstance(value, dict) or value.keys() != {"bytes", "xxh3_128"} or not is_count(value["bytes"]):
        raise CheckpointError(f"{path}: the entry of {name!r} is not a size and a checksum")
    return FileRecord(value["bytes"], str(value["xxh3_128"]))


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
