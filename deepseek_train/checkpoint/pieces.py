"""What a rank puts into a checkpoint: pieces of logical tensors, small replicated tensors, facts.

A logical tensor has a global name and is flat; who held which piece of it when it was saved does not matter
to whoever loads it. So a checkpoint knows nothing of ranks, stages, experts' homes or shards, and any layout
may load it.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import xxhash
from torch import Tensor, uint8

from deepseek_train.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(tensor)) of the logical tensor ``name``. A load writes into ``tensor``."""

    name: str  # global: "master/layers.3.experts.gate_up", the same whichever rank holds it
    start: int
    total: int  # elements of the whole logical tensor
    tensor: Tensor  # 1-D, contiguous; a view of the state itself

    def __post_init__(self) -> None:
        shape = tuple(self.tensor.shape)
        if self.tensor.dim() != 1 or not self.tensor.is_contiguous():
            raise ValueError(
                f"piece of {self.name!r} must be flat and contiguous, its shape is {shape}; pass a view(-1)"
            )
        if self.start < 0 or self.start + len(self.tensor) > self.total:
            raise ValueError(
                f"piece of {self.name!r}: elements [{self.start}, {self.start + len(self.tensor)}) "
                f"are outside of the logical tensor's {self.total}"
            )


@dataclass(frozen=True)
class Snapshot:
    """What one rank puts into a checkpoint, or asks of one. All ranks' pieces hold each element once."""

    pieces: list[Piece] = field(default_factory=list)
    replicated: dict[str, Tensor] = field(default_factory=dict)  # equal wherever held; stored once, flat
    facts: dict[str, Any] = field(default_factory=dict)  # JSON, equal on all ranks; not looked at by a load

    def flat(self) -> dict[str, list[Piece]]:
        """All tensors as pieces, by name, but for empty ones. Raises where a name has two meanings."""
        table: dict[str, list[Piece]] = {}
        whole = [
            Piece(name, 0, tensor.numel(), _flat(name, tensor)) for name, tensor in self.replicated.items()
        ]
        for piece in [*self.pieces, *whole]:
            if len(piece.tensor):
                table.setdefault(piece.name, []).append(piece)
        twice = sorted(self.replicated.keys() & {piece.name for piece in self.pieces})
        if twice:
            raise CheckpointError(
                f"{twice[0]!r} is both a piece and a replicated tensor; give one of them another name"
            )
        return table

    def summary(self, step: int) -> "Summary":
        """Raises CheckpointError where facts would not come back from JSON as they are."""
        facts = {"step": str(step)} | {
            f"fact {key!r}": _json(key, value) for key, value in self.facts.items()
        }
        return Summary(facts, {name: _digest(name, tensor) for name, tensor in self.replicated.items()})


@dataclass(frozen=True)
class Summary:
    """The part of a snapshot that ranks must agree on, short enough to be sent around."""

    facts: dict[str, str]  # JSON
    replicated: dict[str, str]  # type, shape and checksum of the tensors that this rank holds


def check_agreement(summaries: list[Summary]) -> None:
    """Raises CheckpointError that names what differs between which ranks; ``summaries`` are by rank."""
    first = summaries[0].facts
    holders: dict[str, tuple[int, str]] = {}  # of each replicated tensor, the first
    for rank, summary in enumerate(summaries):
        for key in [*first, *(summary.facts.keys() - first.keys())]:
            ours, theirs = first.get(key, "missing"), summary.facts.get(key, "missing")
            if ours != theirs:
                raise CheckpointError(
                    f"{key} must be the same on all ranks: {ours} on rank 0, {theirs} on rank {rank}"
                )
        for name, digest in summary.replicated.items():
            holder, expected = holders.setdefault(name, (rank, digest))
            if digest != expected:
                raise CheckpointError(
                    f"replicated {name!r} must be the same on all ranks: {expected} on rank {holder}, "
                    f"{digest} on rank {rank}"
                )


def _flat(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise CheckpointError(
            f"replicated {name!r} is not contiguous, so it cannot be loaded in place; pass one that is"
        )
    return tensor.detach().view(-1)


def _digest(name: str, tensor: Tensor) -> str:
    checksum = xxhash.xxh3_128_hexdigest(_flat(name, tensor).cpu().view(uint8).numpy().data)
    return f"{tensor.dtype} {list(tensor.shape)} {checksum}"


def _json(key: str, value: object) -> str:
    try:
        text = json.dumps({key: value}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"fact {key!r} is no JSON: {error}") from error
    if json.loads(text) != {key: value}:
        raise CheckpointError(
            f"fact {key!r} would not come back from JSON as it is: {value!r}; "
            "write lists for tuples and text for keys"
        )
    return text
