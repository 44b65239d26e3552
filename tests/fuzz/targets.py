"""Readers of files from elsewhere, each as a function of a file's bytes: they return, or refuse with the error they
promise. Anything else (another exception, a value that lies) is a finding. ``SEEDS``: a good file for each.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
import xxhash

from deepseek_train.checkpoint import index
from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.hf_folder import CONFIG, INDEX, HfFolder
from deepseek_train.checkpoint.manifest import FileRecord, read_manifest
from deepseek_train.config.schema import ModelConfig
from deepseek_train.data import manifest as data_manifest
from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import FileEntry, Shard
from deepseek_train.data.shards import ShardWriter, TokenStream, read_index
from deepseek_train.spec.weights import all_weights
from tests.helpers.hf_folders import exported, random_weights

_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of small files
_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz_", dir=_MEMORY))
_SHARD = "model-00001-of-00001.safetensors"
MODEL = ModelConfig(
    name="fuzz",
    vocab_size=8,
    hidden_size=4,
    num_layers=2,
    num_dense_layers=1,
    num_heads=1,
    qk_nope_head_dim=2,
    qk_rope_head_dim=2,
    v_head_dim=2,
    q_lora_rank=2,
    kv_lora_rank=2,
    dense_ffn_size=4,
    num_routed_experts=2,
    num_shared_experts=1,
    expert_ffn_size=2,
    experts_per_token=1,
    num_expert_groups=1,
    expert_groups_per_token=1,
    routed_scale=1.0,
)
_FILES = {"rank-00000.safetensors": FileRecord(400, "0" * 32)}


def checkpoint_manifest(content: bytes) -> None:
    """With its checksum mended where it can be: damage alone never gets past that."""
    try:
        value = json.loads(content)
        value.pop("xxh3_128", None)
        value["xxh3_128"] = xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
        content = json.dumps(value).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    (_FOLDER / "manifest.json").write_bytes(content)
    try:
        found = read_manifest(_FOLDER)
    except CheckpointError:
        return
    assert found.step >= 0
    for name, record in found.files.items():
        assert (_FOLDER / name).parent == _FOLDER
        assert record.bytes >= 0


def checkpoint_index(content: bytes) -> None:
    try:
        found = index.decode(content, "tensors.json", _FILES)
    except CheckpointError:
        return
    for tensor in found.values():
        assert sum(chunk.length for chunk in tensor.chunks) == tensor.total
        for chunk in tensor.chunks:
            assert chunk.offset >= 0
            assert chunk.offset + chunk.length * tensor.dtype.itemsize <= _FILES[chunk.file].bytes


def token_manifest(content: bytes) -> None:
    (_FOLDER / "manifest.json").write_bytes(content)
    try:
        found = data_manifest.read_manifest(_FOLDER)
    except DataError:
        return
    for shard in found.shards:
        assert (_FOLDER / shard.bin.name).parent == _FOLDER
        assert shard.tokens >= 0
    found.content_hash()


def token_index(content: bytes) -> None:
    path = _FOLDER / "a.idx"
    path.write_bytes(content)
    try:
        read_index(path)
    except DataError:
        return


def token_shard(content: bytes) -> None:
    """The first half is the index, the second the tokens; the manifest believes both."""
    half = len(content) * 4 // 5
    parts = {"a.idx": content[:half], "a.bin": content[half:]}
    for name, part in parts.items():
        (_FOLDER / name).write_bytes(part)
    files = {name: FileEntry(name, len(part), "") for name, part in parts.items()}
    try:
        dtype, lengths = read_index(_FOLDER / "a.idx")
        shard = Shard("train", int(lengths.sum(dtype=np.int64)), len(lengths), files["a.bin"], files["a.idx"])
        stream = TokenStream(_FOLDER, (shard,))
    except DataError:
        return
    assert len(stream) * dtype.itemsize == len(parts["a.bin"])
    stream.read_into(np.empty(len(stream), np.int64), 0)


def _hf(name: str, content: bytes) -> None:
    """``content`` in place of a file of a good folder; what is opened can be read to its end."""
    good = _hf_folder()
    path, before = good / name, (good / name).read_bytes()
    path.write_bytes(content)
    try:
        folder = HfFolder.open(good)
        for weight in all_weights(folder.model):
            assert folder.read(weight.name).shape == weight.shape
    except CheckpointError:
        return
    finally:
        path.write_bytes(before)


def hf_config(content: bytes) -> None:
    _hf(CONFIG, content)


def hf_index(content: bytes) -> None:
    _hf(INDEX, content)


def hf_shard(content: bytes) -> None:
    _hf(_SHARD, content)


@cache
def _hf_folder() -> Path:
    return exported(_FOLDER, MODEL, random_weights(MODEL))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        checkpoint_manifest,
        checkpoint_index,
        token_manifest,
        token_index,
        token_shard,
        hf_config,
        hf_index,
        hf_shard,
    )
}


def seeds() -> dict[str, bytes]:
    """A good file for each target."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_alone(
            folder,
            3,
            [Planned("w", torch.float32, 20), Planned("b", torch.bfloat16, 5)],
            lambda name, start, end: iter(
                [torch.zeros(end - start, dtype=torch.float32 if name == "w" else torch.bfloat16)]
            ),
            {"tokens": 1},
            file_bytes=400,
        )
        manifest, table = (path / "manifest.json").read_bytes(), (path / "tensors.json").read_bytes()
        writer = ShardWriter(folder, "train", np.dtype("<u2"))
        for length in (3, 0, 5):
            writer.add(np.arange(length))
        (shard,) = writer.finish()
        idx, tokens = (folder / shard.idx.name).read_bytes(), (folder / shard.bin.name).read_bytes()
    tokenizer = FileEntry("tokenizer.json", 3, "1")
    settings = data_manifest.Settings("s", "0", None, 0.1, 0, 5)
    whole = data_manifest.Manifest(settings, 100, 9, 50, {}, tokenizer, (shard,))
    values = {"format": data_manifest.MANIFEST_FORMAT, **asdict(whole)}
    return {
        "checkpoint_manifest": manifest,
        "checkpoint_index": table,
        "token_manifest": json.dumps(values).encode(),
        "token_index": idx,
        "token_shard": idx + tokens,
        "hf_config": (_hf_folder() / CONFIG).read_bytes(),
        "hf_index": (_hf_folder() / INDEX).read_bytes(),
        "hf_shard": (_hf_folder() / _SHARD).read_bytes(),
    }
