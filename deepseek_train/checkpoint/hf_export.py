"""Weights -> a folder in Hugging Face's layout, as DeepSeek publishes its models: one tensor per matrix and expert.

Tensor by tensor: what is in memory at once is one published tensor. All or nothing: the folder has its name when it is
complete.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.hf_config import CONFIG, to_hf, unsaid
from deepseek_train.checkpoint.hf_folder import INDEX
from deepseek_train.checkpoint.hf_fp8 import SCALE, quantise, scale_shape
from deepseek_train.checkpoint.places import fsync_folder
from deepseek_train.checkpoint.safetensors_stream import Header, write_stream
from deepseek_train.checkpoint.weight_source import WeightSource
from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.published import Published, all_published

HfType = Literal["bf16", "fp32", "fp8"]
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class _Shard:
    tensors: list[Published]
    headers: list[Header]

    @property
    def bytes(self) -> int:
        return sum(header.bytes for header in self.headers)


def export_bytes(m: ModelConfig, dtype: HfType) -> int:
    """Of all tensors of an export."""
    return sum(header.bytes for one in all_published(m) for header in _headers(one, dtype))


def export(
    source: WeightSource,
    target: Path,
    dtype: HfType,
    *,
    extras: Mapping[str, bytes],
    tokens: Mapping[str, int],
    shard_bytes: int,
    done: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes ``source`` to the new folder ``target``. ``extras``: further files, as the tokenizer's. ``tokens``: ids
    for config.json. ``done`` is told the bytes of each tensor when it is written.

    ``fp8``: the matrices that DeepSeek-V3 publishes so, quantised from what ``source`` holds (not from BF16); the rest
    BF16. Router biases are FP32 in all types.

    Raises CheckpointError: ``target`` exists, config.json cannot say what the model is, a weight is not finite;
    OSError.
    """
    m = source.model
    if target.exists():
        raise CheckpointError(f"{target} exists already: name a folder that does not")
    problems = list(unsaid(m))
    if problems:
        told = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(f"{CONFIG} cannot say what this model is:\n{told}")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.unfinished")
    draft.mkdir()
    try:
        shards = list(_shards(m, dtype, shard_bytes))
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            write_stream(draft / name, shard.headers, _tensors(source, shard.tensors, dtype, done))
        index = {
            "metadata": {"total_size": sum(shard.bytes for shard in shards)},
            "weight_map": {h.name: n for n, shard in zip(names, shards, strict=True) for h in shard.headers},
        }
        for name, content in {
            INDEX: _json(index),
            CONFIG: _json(to_hf(m, dtype, tokens)),
            **extras,
        }.items():
            (draft / name).write_bytes(content)
        fsync_folder(draft)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _shards(m: ModelConfig, dtype: HfType, most: int) -> Iterator[_Shard]:
    """Files of at most ``most`` bytes, or of one tensor; a matrix and its scales are in one."""
    shard, size = _Shard([], []), 0
    for one in all_published(m):
        headers = _headers(one, dtype)
        bytes = sum(header.bytes for header in headers)
        if shard.tensors and size + bytes > most:
            yield shard
            shard, size = _Shard([], []), 0
        shard.tensors.append(one)
        shard.headers.extend(headers)
        size += bytes
    yield shard


def _headers(one: Published, dtype: HfType) -> list[Header]:
    if not one.weight.trained:
        return [Header(one.name, torch.float32, one.shape)]
    if dtype == "fp8" and one.weight.linear:
        return [
            Header(one.name, torch.float8_e4m3fn, one.shape),
            Header(one.name + SCALE, torch.float32, scale_shape(one.shape)),
        ]
    return [Header(one.name, _TYPES[dtype], one.shape)]


def _tensors(
    source: WeightSource, wanted: list[Published], dtype: HfType, done: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    for one in wanted:
        tensor = source.piece(one)
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{one.name} holds values that are not finite: take an earlier checkpoint than this one"
            )
        headers = _headers(one, dtype)
        made_of = quantise(tensor) if len(headers) == 2 else (tensor.to(headers[0].dtype),)
        for header, made in zip(headers, made_of, strict=True):
            yield header.name, made
        done(sum(header.bytes for header in headers))
