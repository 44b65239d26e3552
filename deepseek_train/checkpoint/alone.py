"""A checkpoint written by one process, part by part: never the whole model in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_train.checkpoint import index
from deepseek_train.checkpoint.folders import commit, new_draft
from deepseek_train.checkpoint.manifest import Manifest, record_of
from deepseek_train.checkpoint.places import Place, remove_folder, write_synced
from deepseek_train.checkpoint.plan import Offer, file_of, plan_save
from deepseek_train.checkpoint.tensor_file import Part, layout_of, write_tensor_file

FILE_BYTES = 4 << 30  # of one file, where tensors are to be had by the part


@dataclass(frozen=True)
class Planned:
    """A logical tensor to be written."""

    name: str
    dtype: torch.dtype
    total: int  # elements


def write_alone(
    root: Place,
    step: int,
    tensors: Sequence[Planned],
    produce: Callable[[str, int, int], Iterator[Tensor]],
    facts: dict[str, Any],
    file_bytes: int = FILE_BYTES,
) -> Place:
    """Writes the checkpoint of ``step`` in ``root``; returns its folder.

    ``produce(name, start, end)`` yields elements [start, end) of a tensor as flat CPU tensors in a row, of its type.
    Files hold up to about ``file_bytes``. Nothing is left in ``root`` where it raises.
    """
    offers = [Offer(tuple(parts), ()) for parts in _files(tensors, file_bytes)]
    plan = plan_save(offers)
    draft = new_draft(root, step)
    try:
        records = {}
        for number, parts in enumerate(plan.parts):
            layout = layout_of(parts)
            stream = (t for part in layout.parts for t in produce(part.name, part.start, part.end))
            records[file_of(number)] = write_tensor_file(draft / file_of(number), layout, stream)
        content = index.encode(plan.tensors)
        write_synced(draft / index.NAME, content)
        return commit(draft, Manifest(step, facts, records | {index.NAME: record_of(content)}))
    except BaseException:
        remove_folder(draft)
        raise


def _files(tensors: Sequence[Planned], limit: int) -> Iterator[list[Part]]:
    """Tensors in a row, cut where a file is full."""
    parts: list[Part] = []
    room = limit
    for tensor in tensors:
        start = 0
        while start < tensor.total:
            count = min(tensor.total - start, max(1, room // tensor.dtype.itemsize))
            parts.append(Part(tensor.name, start, count, tensor.total, tensor.dtype))
            start += count
            room -= count * tensor.dtype.itemsize
            if room < tensor.dtype.itemsize:
                yield parts
                parts, room = [], limit
    if parts:
        yield parts
