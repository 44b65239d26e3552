"""``manifest.json``: what a folder of token shards holds, and what it was made of.

The tokens themselves are in Megatron files beside it (see ``shards``), the tokenizer in ``tokenizer.json``.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from deepseek_train.config.untrusted import is_plain_name
from deepseek_train.data.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FORMAT = "deepseek_train tokens 1"

_REMAKE = "remove the folder and run: deepseek-data prepare data.path=.. data.source=.."


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder."""

    name: str
    size: int  # bytes
    xxh3_128: str  # hex digest of its content


@dataclass(frozen=True)
class Shard:
    """One ``.bin`` with its ``.idx``."""

    split: str
    tokens: int
    documents: int
    bin: FileEntry
    idx: FileEntry


@dataclass(frozen=True)
class Settings:
    """What preparation was asked for; data of other settings is other data."""

    source: str
    tokenizer_sha256: str
    max_megabytes: int | None
    fim_rate: float
    fim_seed: int
    validation_percent: int


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``."""

    settings: Settings
    vocab_size: int  # of the tokenizer
    max_token_id: int  # largest id that occurs
    text_bytes: int
    package_versions: dict[str, str]  # of the builtin corpus; empty for other sources
    tokenizer: FileEntry
    shards: tuple[Shard, ...]

    def of_split(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split, in stream order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens(self, split: str) -> int:
        """Number of tokens in ``split``."""
        return sum(shard.tokens for shard in self.of_split(split))

    def documents(self, split: str) -> int:
        """Number of documents in ``split``."""
        return sum(shard.documents for shard in self.of_split(split))

    def content_hash(self) -> str:
        """Hex digest of what the tokens are, not of how or where they were made: equal data, equal order."""
        content = [self.tokenizer.xxh3_128, [[shard.split, shard.bin.xxh3_128] for shard in self.shards]]
        return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        text = json.dumps({"format": MANIFEST_FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        write_file(folder / MANIFEST_FILE, f"{text}\n".encode())


def write_file(path: Path, content: bytes | bytearray) -> FileEntry:
    """Write ``content`` through to the disk; its entry in the manifest."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(path.name, len(content), xxhash.xxh3_128_hexdigest(content))


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the folder ``path``.

    Raises:
        DataError: there is none, or it is not one.
    """
    file = Path(path) / MANIFEST_FILE
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        mend = "prepare the data first: deepseek-data prepare data.path=.. data.source=.."
        raise DataError("there are no prepared tokens here", str(file), mend) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the manifest cannot be read: {error}", str(file), _REMAKE) from error
    try:
        return _parse(values)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"this is not a manifest of token shards: {error}", str(file), _REMAKE) from error


def _parse(values: Any) -> Manifest:
    found = _checked(values, dict).get("format")
    if found != MANIFEST_FORMAT:
        raise ValueError(f"format is {found!r}, not {MANIFEST_FORMAT!r}")
    values = {key: value for key, value in values.items() if key != "format"}
    shards = [
        Shard(**{**shard, "bin": FileEntry(**shard["bin"]), "idx": FileEntry(**shard["idx"])})
        for shard in _checked(values["shards"], list)
    ]
    settings, tokenizer = Settings(**values["settings"]), FileEntry(**values["tokenizer"])
    manifest = Manifest(**{**values, "settings": settings, "tokenizer": tokenizer, "shards": tuple(shards)})
    entries = [tokenizer, *(entry for shard in shards for entry in (shard.bin, shard.idx))]
    for entry in entries:
        if not is_plain_name(entry.name):
            raise ValueError(f"{entry.name!r} is no plain name of a file beside it")
    parts: list[DataclassInstance] = [manifest, manifest.settings, *shards, *entries]
    for part in parts:
        _check_fields(part)
    return manifest


def _check_fields(part: "DataclassInstance") -> None:
    for field in fields(part):
        value = getattr(part, field.name)
        if field.type is int and _checked(value, int) < 0:
            raise ValueError(f"{field.name} is negative")
        if field.type is str:
            _checked(value, str)


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a {kind.__name__}")
    return value
