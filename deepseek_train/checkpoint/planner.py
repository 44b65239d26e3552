"""Pieces in the language of torch.distributed.checkpoint (DCP): who writes what, who reads what.

DCP's own planners know tensors, DTensors and an underscore-private protocol; these two are written against
its public planner interface instead, store everything as chunks of flat tensors, and check what DCP leaves
unchecked: gaps, overlaps and data types at saving, data types and forgotten tensors at loading. What they
raise on one rank, ``agree`` brings to all.
"""

import io
from collections.abc import Iterable
from typing import Any

from torch import Size, Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from deepseek_train.checkpoint.agree import CheckpointError
from deepseek_train.checkpoint.pieces import Piece, Snapshot

SHOWN = 5  # problems told at once


class PieceSavePlanner(SavePlanner):
    """Every piece is written by its holder, every replicated tensor by the first rank that has it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self.metadata: Metadata | None = None  # on rank 0, after the global plan

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to do: the snapshot is known since the start."""

    def create_local_plan(self) -> SavePlan:
        table = self._snapshot.flat()
        self._tensors = _by_start(table)
        items = [_write_item(piece) for pieces in table.values() for piece in pieces]
        return SavePlan(items, planner_data=frozenset(self._snapshot.replicated))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, written = [], set[str]()
        for plan in all_plans:
            kept = [item for item in plan.items if item.index.fqn not in plan.planner_data & written]
            plans.append(SavePlan(kept))
            written |= plan.planner_data
        _raise_any(_save_problems(plans))
        plans, self.metadata = create_default_global_save_plan(plans)
        return plans, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name, (start,) = write_item.index.fqn, write_item.index.offset or (0,)
        return self._tensors[name, start]


class PieceLoadPlanner(LoadPlanner):
    """Every piece is put together from whatever chunks of its tensor were stored.

    A stored tensor that no rank asks for is an error: it would be lost at the next save.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self._stored: dict[str, Any] = {}

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self._stored = metadata.state_dict_metadata if metadata else {}

    def create_local_plan(self) -> LoadPlan:
        table = self._snapshot.flat()
        _raise_any(_load_problems(table, self._stored))
        self._tensors = _by_start(table)
        items = []
        for name, pieces in table.items():
            items += create_read_items_for_chunk_list(
                name, self._stored[name], [_chunk(piece) for piece in pieces]
            )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        asked = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        _raise_any(
            f"{name!r} is in the checkpoint, but no rank asks for it"
            for name in sorted(self._stored.keys() - asked)
        )
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        name, (start,) = read_item.dest_index.fqn, read_item.dest_index.offset or (0,)
        return self._tensors[name, start].narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: DCP wrote into the piece's own memory."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(
            f"{read_item.dest_index.fqn!r} is no tensor: this checkpoint was not written by this room"
        )


def _by_start(table: dict[str, list[Piece]]) -> dict[tuple[str, int], Tensor]:
    """How DCP's items find their memory again: by name and start, which so must be unique on a rank."""
    tensors: dict[tuple[str, int], Tensor] = {}
    for piece in (piece for pieces in table.values() for piece in pieces):
        if (piece.name, piece.start) in tensors:
            raise CheckpointError(f"this rank has two pieces of {piece.name!r} that start at {piece.start}")
        tensors[piece.name, piece.start] = piece.tensor.detach()
    return tensors


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=Size([piece.start]), sizes=piece.tensor.shape)


def _write_item(piece: Piece) -> WriteItem:
    data = TensorWriteData(_chunk(piece), TensorProperties(dtype=piece.tensor.dtype), Size([piece.total]))
    return WriteItem(MetadataIndex(piece.name, [piece.start]), WriteItemType.SHARD, tensor_data=data)


def _save_problems(plans: list[SavePlan]) -> Iterable[str]:
    """Where the ranks' pieces of a tensor disagree about it, overlap or leave a gap."""
    holders: dict[str, list[tuple[int, int, int, TensorWriteData]]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            assert item.tensor_data is not None
            (start,), (length,) = item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes
            holders.setdefault(item.index.fqn, []).append((start, start + length, rank, item.tensor_data))
    for name, held in holders.items():
        held.sort(key=lambda entry: entry[:3])
        _, _, first, data = held[0]
        for _, _, rank, other in held:
            if (other.size, other.properties.dtype) != (data.size, data.properties.dtype):
                yield (
                    f"{name!r} has {data.size[0]} elements of {data.properties.dtype} for rank {first}, "
                    f"but {other.size[0]} of {other.properties.dtype} for rank {rank}"
                )
        at, before = 0, first
        for start, end, rank, _ in held:
            if start > at:
                yield f"{name!r}: no rank holds elements [{at}, {start}) of {data.size[0]}"
            if start < at:
                yield f"{name!r}: ranks {before} and {rank} both hold elements [{start}, {min(at, end)})"
            at, before = max(at, end), rank
        if at < data.size[0]:
            yield f"{name!r}: no rank holds elements [{at}, {data.size[0]}) of {data.size[0]}"


def _load_problems(table: dict[str, list[Piece]], stored: dict[str, Any]) -> Iterable[str]:
    for name, pieces in table.items():
        found = stored.get(name)
        if not isinstance(found, TensorStorageMetadata):
            yield f"{name!r} is not in the checkpoint"
            continue
        for piece in pieces:
            if found.size != (piece.total,):
                yield f"{name!r} has {found.size[0]} elements in the checkpoint, {piece.total} are expected"
            if found.properties.dtype != piece.tensor.dtype:
                stored_as, wanted = found.properties.dtype, piece.tensor.dtype
                yield f"{name!r} is {stored_as} in the checkpoint, {wanted} is expected"


def _raise_any(problems: Iterable[str]) -> None:
    found = list(dict.fromkeys(problems))
    if found:
        more = [f"and {len(found) - SHOWN} more of this kind"] if len(found) > SHOWN else []
        raise CheckpointError("; ".join(found[:SHOWN] + more))
