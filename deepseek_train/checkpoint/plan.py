"""Who writes what: from all ranks' pieces, once a run, since nobody's pieces change.

Every piece is written by its holder, every replicated tensor by the first rank that has it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.index import Chunk, StoredTensor
from deepseek_train.checkpoint.pieces import Snapshot
from deepseek_train.checkpoint.tensor_file import Part, layout_of, parts_at

SHOWN = 5  # problems told at once


@dataclass(frozen=True)
class Offer:
    """A rank's parts: its own pieces, and what others hold too."""

    pieces: tuple[Part, ...]
    replicated: tuple[Part, ...]

    def digest(self) -> str:
        """Equal offers make equal plans."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


@dataclass(frozen=True)
class SavePlan:
    """Each rank's parts, and the index of the checkpoint that they make."""

    parts: tuple[tuple[Part, ...], ...]  # by rank
    tensors: tuple[StoredTensor, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for parts in self.parts for part in parts)


def file_of(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def offer_of(snapshot: Snapshot) -> Offer:
    """Raises CheckpointError where a rank's own pieces have two meanings."""
    pieces: list[Part] = []
    replicated: list[Part] = []
    seen = set[tuple[str, int]]()
    for name, held in snapshot.flat().items():
        for piece in held:
            if (name, piece.start) in seen:
                raise CheckpointError(f"this rank has two pieces of {name!r} that start at {piece.start}")
            seen.add((name, piece.start))
            part = Part(name, piece.start, len(piece.tensor), piece.total, piece.tensor.dtype)
            (replicated if name in snapshot.replicated else pieces).append(part)
    return Offer(tuple(pieces), tuple(replicated))


def plan_save(offers: list[Offer]) -> SavePlan:
    """Raises CheckpointError where the ranks' pieces of a tensor disagree, overlap or leave a gap."""
    written, kept = set[str](), []
    for offer in offers:
        first = [part for part in offer.replicated if part.name not in written]
        written |= {part.name for part in first}
        kept.append((*offer.pieces, *first))
    raise_any(_problems(kept))
    chunks: dict[str, list[Chunk]] = {}
    kinds: dict[str, Part] = {}
    for rank, parts in enumerate(kept):
        for part, file, offset in parts_at(file_of(rank), layout_of(parts)):
            chunks.setdefault(part.name, []).append(Chunk(part.start, part.length, file, offset))
            kinds.setdefault(part.name, part)
    tensors = (
        StoredTensor(name, kinds[name].dtype, kinds[name].total, tuple(sorted(found, key=lambda c: c.start)))
        for name, found in chunks.items()
    )
    return SavePlan(tuple(kept), tuple(tensors))


def _problems(ranks: list[tuple[Part, ...]]) -> Iterator[str]:
    holders: dict[str, list[tuple[int, int, int, Part]]] = {}
    for rank, parts in enumerate(ranks):
        for part in parts:
            holders.setdefault(part.name, []).append((part.start, part.end, rank, part))
    for name, held in holders.items():
        held.sort(key=lambda entry: entry[:3])
        _, _, first, kind = held[0]
        for _, _, rank, other in held:
            if (other.total, other.dtype) != (kind.total, kind.dtype):
                yield (
                    f"{name!r} has {kind.total} elements of {kind.dtype} for rank {first}, "
                    f"but {other.total} of {other.dtype} for rank {rank}"
                )
        at, before = 0, first
        for start, end, rank, _ in held:
            if start > at:
                yield f"{name!r}: no rank holds elements [{at}, {start}) of {kind.total}"
            if start < at:
                yield f"{name!r}: ranks {before} and {rank} both hold elements [{start}, {min(at, end)})"
            at, before = max(at, end), rank
        if at < kind.total:
            yield f"{name!r}: no rank holds elements [{at}, {kind.total}) of {kind.total}"


def raise_any(problems: Iterable[str]) -> None:
    found = list(dict.fromkeys(problems))
    if found:
        more = [f"and {len(found) - SHOWN} more of this kind"] if len(found) > SHOWN else []
        raise CheckpointError("; ".join(found[:SHOWN] + more))
