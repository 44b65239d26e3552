"""Checkpoints and Hugging Face folders of small models, and what is in them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.hf_config import CONFIG
from deepseek_train.checkpoint.hf_export import HfType, export
from deepseek_train.checkpoint.hf_folder import INDEX
from deepseek_train.checkpoint.stored import StoredCheckpoint
from deepseek_train.checkpoint.weight_source import CheckpointWeights, checkpoint_names
from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.weights import all_weights


def random_weights(m: ModelConfig, seed: int = 5) -> dict[str, Tensor]:
    """FP32 values that neither BF16 nor FP8 can hold, by table name."""
    generator = torch.Generator().manual_seed(seed)
    return {w.name: torch.randn(w.shape, generator=generator) for w in all_weights(m)}


def store(
    root: Path, m: ModelConfig, tensors: Mapping[str, Tensor], kind: str = "master", **facts: Any
) -> Path:
    """A checkpoint of these weights, given by table name."""
    by_name = {stored: tensors[name].float() for name, stored in checkpoint_names(m, kind).items()}
    planned = [Planned(name, torch.float32, t.numel()) for name, t in by_name.items()]
    produce = lambda name, start, end: iter([by_name[name].flatten()[start:end]])  # noqa: E731
    path = write_alone(root, 0, planned, produce, {"model": asdict(m), **facts})
    assert isinstance(path, Path)
    return path


def exported(
    folder: Path,
    m: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: HfType = "fp32",
    shard_bytes: int = 10**9,
) -> Path:
    """``folder``/hf: the weights as an export, by way of a checkpoint."""
    source = CheckpointWeights(StoredCheckpoint.open(store(folder / "stored", m, tensors)))
    export(source, folder / "hf", dtype, extras={}, tokens={}, shard_bytes=shard_bytes)
    return folder / "hf"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, by the library and the index."""
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        tensors = load_file(folder / file)
        assert sorted(tensors) == sorted(name for name, where in names.items() if where == file)
        found |= tensors
    return found


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """To the last bit, types included."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
        bits = tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8)
        assert torch.equal(*bits), name


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return content


def change_config(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | fields))
