"""A folder in Hugging Face's layout -> a checkpoint of ours: FP32 masters, each value exactly what was published.

Tensor by tensor, as the checkpoint's files are written. There are no moments in it: training that starts from it starts
its optimizer afresh.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_train.checkpoint.alone import FILE_BYTES, Planned, write_alone
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.hf_folder import HfFolder
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.weight_source import checkpoint_names
from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.published import pieces
from deepseek_train.spec.weights import all_weights


def import_bytes(m: ModelConfig) -> int:
    """Of all tensors that an import writes."""
    return sum(weight.size * torch.float32.itemsize for weight in all_weights(m))


def import_hf(
    folder: HfFolder,
    root: Path,
    facts: dict[str, Any],
    *,
    done: Callable[[int], None] = lambda size: None,
    file_bytes: int = FILE_BYTES,
) -> Place:
    """Writes the weights of ``folder`` as the checkpoint of step 0 in ``root``; returns its folder. ``facts`` join the
    model's. ``done`` is told the bytes of each part when it has been read.

    Raises CheckpointError: a weight is not finite, an MTP module has an embedding or head of its own; OSError.
    """
    folder.check_copies()
    names = checkpoint_names(folder.model)
    weights = {names[weight.name]: weight for weight in all_weights(folder.model)}

    def produce(name: str, start: int, end: int) -> Iterator[Tensor]:
        for one in pieces(weights[name]):
            low, high = max(start, one.start), min(end, one.start + one.size)
            if low >= high:
                continue
            tensor = folder.piece(one)
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{one.name} holds values that are not finite: nothing can be trained from it"
                )
            part = tensor.flatten()[low - one.start : high - one.start].float()
            yield part
            done(part.numel() * part.itemsize)

    planned = [Planned(name, torch.float32, weight.size) for name, weight in weights.items()]
    return write_alone(
        root,
        0,
        planned,
        produce,
        {"model": asdict(folder.model), "step": 0, "tokens": 0, **facts},
        file_bytes,
    )
