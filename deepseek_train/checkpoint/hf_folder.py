"""A folder in Hugging Face's layout, read with suspicion: config.json, model.safetensors.index.json, and its shards.

Nothing in it is run, and no path in it leads out of it. Names, shapes and types of all tensors are held against the
configuration before the first is read.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek_train.checkpoint.errors import CheckpointError, reason
from deepseek_train.checkpoint.hf_config import CONFIG, from_hf
from deepseek_train.checkpoint.hf_fp8 import SCALE, dequantise, scale_shape
from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.published import Published, all_published, copies, pieces
from deepseek_train.spec.weights import all_weights

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"

_FLOATS = ("F32", "BF16", "F16")
_MOST_BYTES = {CONFIG: 2**20, INDEX: 2**28}
_TOLD = 20  # problems of one folder


class HfFolder:
    """Weights of a Hugging Face folder by their names in our table. A ``WeightSource``."""

    def __init__(self, model: ModelConfig, files: Mapping[str, Path]) -> None:
        self.model = model
        self._files = files  # of each published tensor
        self._weights = {weight.name: weight for weight in all_weights(model)}
        self._open: tuple[Path, Any] | None = None  # a shard is asked for many tensors in a row

    @staticmethod
    def open(folder: Path) -> "HfFolder":
        """Raises CheckpointError with everything that is wrong: unreadable files, a model of another kind, tensors
        that are missing, have no place, or another shape or type than the configuration asks for."""
        m = from_hf(_read_json(folder, CONFIG), str(folder / CONFIG), folder.resolve().name)
        files = _files(folder)
        problems = list(islice(_problems(m, files, _headers(files)), _TOLD + 1))
        if problems:
            told = "\n".join(f"  - {problem}" for problem in problems[:_TOLD])
            more = "\n  ... and more" if len(problems) > _TOLD else ""
            raise CheckpointError(
                f"the tensors in {folder} are not those of its {CONFIG}:\n{told}{more}\n"
                f"Use the {CONFIG} that was published with them."
            )
        return HfFolder(m, files)

    def read(self, name: str) -> Tensor:
        """See ``WeightSource``. What is published in FP8 comes as FP32."""
        weight = self._weights[name]
        return torch.cat([self.piece(one).flatten() for one in pieces(weight)]).view(weight.shape)

    def piece(self, published: Published) -> Tensor:
        """See ``WeightSource``."""
        tensor = self._tensor(published.name)
        if tensor.dtype is torch.float8_e4m3fn:
            return dequantise(tensor, self._tensor(published.name + SCALE))
        return tensor

    def check_copies(self) -> None:
        """Raises CheckpointError where an MTP module has an embedding or a head of its own, not the main model's."""
        for weight in all_weights(self.model):
            for copy in copies(weight):
                if copy.name in self._files and not torch.equal(self.read(weight.name), self.piece(copy)):
                    raise CheckpointError(
                        f"{copy.name} in {self._files[copy.name]} differs from {weight.hf[0].name}: "
                        "MTP modules share the main model's here. Leave the modules out: "
                        f"num_nextn_predict_layers 0 in {CONFIG}, and their tensors"
                    )

    def _tensor(self, name: str) -> Tensor:
        path = self._files[name]
        if self._open is None or self._open[0] != path:
            self._open = path, _open_shard(path)
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        if path.stat().st_size > _MOST_BYTES[name]:
            raise CheckpointError(f"{path} has more than {_MOST_BYTES[name]} bytes: that is no {name}")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no object, but {type(content).__name__}")
    return content


def _files(folder: Path) -> dict[str, Path]:
    """Where each tensor is, by the index, or all in one file where there is none."""
    if not (folder / INDEX).exists():
        path = folder / ONE_FILE
        return dict.fromkeys(_open_shard(path).keys(), path)
    names = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise CheckpointError(f"{folder / INDEX} has no object 'weight_map'")
    strange = sorted({str(n) for n in names.values() if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(n))})
    if strange:
        raise CheckpointError(
            f"{folder / INDEX} names what is no safetensors file of this folder: {', '.join(strange[:_TOLD])}"
        )
    return {tensor: folder / name for tensor, name in names.items()}


def _open_shard(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


def _headers(files: Mapping[str, Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor that the index names and its file has."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, path in files.items():
        by_file[path].append(name)
    found = {}
    for path, names in by_file.items():
        shard = _open_shard(path)
        for name in sorted(set(names) & set(shard.keys())):
            header = shard.get_slice(name)
            found[name] = header.get_dtype(), tuple(header.get_shape())
    return found


def _problems(
    m: ModelConfig, files: Mapping[str, Path], found: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[str]:
    wanted = set()
    optional = {copy.name for weight in all_weights(m) for copy in copies(weight)}
    for one in all_published(m):
        wanted.add(one.name)
        if one.name not in files and one.name in optional:
            continue
        if one.name not in found:
            where = f"not in {files[one.name]}, where the index has it" if one.name in files else "missing"
            yield f"{one.name} is {where}"
            continue
        dtype, shape = found[one.name]
        if shape != one.shape:
            yield f"{one.name} has shape {list(shape)}, the configuration asks for {list(one.shape)}"
        if dtype == "F8_E4M3" and len(shape) == 2:
            wanted.add(one.name + SCALE)
            scales = found.get(one.name + SCALE)
            if scales != ("F32", scale_shape(shape)):
                had = "missing" if scales is None else f"{scales[0]} {list(scales[1])}"
                yield f"{one.name + SCALE} is {had}, not F32 {list(scale_shape(shape))}"
        elif dtype not in _FLOATS:
            yield f"{one.name} is of type {dtype}, not one of {' '.join(_FLOATS)}, nor a matrix of F8_E4M3"
    yield from (f"{name} has no place in the model" for name in sorted(files.keys() - wanted))
