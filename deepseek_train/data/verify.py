"""A folder of tokens against its manifest, byte by byte."""

from pathlib import Path

import xxhash

from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import FileEntry, Manifest, Shard
from deepseek_train.data.shards import REMAKE, check_size, open_shard

_READ_BYTES = 1 << 24
_SCAN_TOKENS = 1 << 22


def verify(folder: Path, manifest: Manifest) -> list[DataError]:
    """What is wrong with the files of ``manifest`` in ``folder``: sizes, checksums, indices, token ids."""
    problems = []
    for shard in manifest.shards:
        damaged = [*_file_problems(folder, shard.bin), *_file_problems(folder, shard.idx)]
        problems += damaged or _token_problems(folder, shard, manifest)
    return problems + _file_problems(folder, manifest.tokenizer)


def _file_problems(folder: Path, entry: FileEntry) -> list[DataError]:
    path = folder / entry.name
    try:
        check_size(folder, entry)
    except DataError as problem:
        return [problem]
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while content := stream.read(_READ_BYTES):
            digest.update(content)
    if digest.hexdigest() == entry.xxh3_128:
        return []
    what = f"the checksum differs: expected xxh3_128 {entry.xxh3_128}, found {digest.hexdigest()}"
    return [DataError(what, str(path), REMAKE)]


def _token_problems(folder: Path, shard: Shard, manifest: Manifest) -> list[DataError]:
    try:
        tokens_N = open_shard(folder, shard)
    except DataError as problem:
        return [problem]
    for start in range(0, len(tokens_N), _SCAN_TOKENS):
        part_N = tokens_N[start : start + _SCAN_TOKENS]
        lowest, highest = int(part_N.min()), int(part_N.max())
        if lowest < 0 or highest > manifest.max_token_id or highest >= manifest.vocab_size:
            limit = min(manifest.max_token_id, manifest.vocab_size - 1)
            what = f"token ids lie in [{lowest}, {highest}], the manifest allows [0, {limit}]"
            return [DataError(what, f"{folder / shard.bin.name}, from token {start}", REMAKE)]
    return []
