"""Save at once, find and load checkpoints. All or nothing: a checkpoint is complete and verified, or it does not
exist.

Loading: checksums of all files, each by one rank, then each rank reads the elements it asks for, whoever wrote them.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO

from deepseek_train.checkpoint import index
from deepseek_train.checkpoint.agree import on_first, own_rank, together, world_size
from deepseek_train.checkpoint.errors import CheckpointError, CheckpointUnreadable
from deepseek_train.checkpoint.folders import newest, set_aside, without_manifest
from deepseek_train.checkpoint.index import StoredTensor
from deepseek_train.checkpoint.manifest import Manifest, read_manifest, verify
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.plan import raise_any
from deepseek_train.checkpoint.retention import Retention
from deepseek_train.checkpoint.saver import Saver
from deepseek_train.checkpoint.tensor_file import read_range

log = logging.getLogger(__name__)


def save(root: Place, step: int, snapshot: Snapshot, *, keep: int) -> Place:
    """Write all ranks' snapshots as the checkpoint of ``step`` in ``root`` and wait for it (collective); then all but
    the newest ``keep`` are deleted. Returns its folder. Raises as ``Saver.begin`` does."""
    saver = Saver(root, Retention(keep))
    try:
        saver.begin(step, snapshot)
        final = saver.finish()
    except CheckpointError:
        saver.close()
        raise
    together(saver.close, lambda nothings: nothings)
    return final


def newest_good(root: Place, step: int | None = None) -> Place | None:
    """The latest checkpoint (of ``step`` at most) all of whose files are what its manifest says; None where there is
    none (collective).

    Those found damaged on the way are set aside (``step-N.bad``), with a warning that says what is wrong with it.
    Raises CheckpointError where it cannot be told which are: a disk that does not answer, or a folder that is not the
    same for all ranks.
    """

    def look() -> tuple[Place | None, bool]:
        for path, reason in without_manifest(root):
            log.warning("set aside as %s: %s", set_aside(path, reason), reason)
        return newest(root, step), True

    while True:
        path, _ = on_first(look)
        if path is None:
            return None
        reason = problem_of(path)
        if reason is None:
            return path

        def put_away(path: Place = path, reason: str = reason) -> None:
            log.warning("set aside as %s: %s", set_aside(path, reason), reason)

        on_first(put_away)


def problem_of(path: Place) -> str | None:
    """What is damaged in a checkpoint, None where nothing is; all files are read, each by one rank (collective). Raises
    as ``newest_good`` does."""
    return together(
        lambda: _damaged(path, own_rank(), world_size()), lambda found: [_confirmed(path, found)] * len(found)
    )


def _damaged(path: Place, rank: int, ranks: int) -> dict[str, str]:
    """What is wrong with which of this rank's share of the files."""
    manifest = read_manifest(path)  # rank 0 has read it: whoever cannot sees another folder
    found = {}
    for name in sorted(manifest.files)[rank::ranks]:
        try:
            verify(path, name, manifest.files[name])
        except CheckpointUnreadable:
            raise
        except CheckpointError as error:
            found[name] = str(error)
    return found


def _confirmed(path: Place, damaged: list[dict[str, str]]) -> str | None:
    """Rank 0 looks again at what ranks have found: a node whose disk is not mounted must not condemn a checkpoint."""
    files, reasons = read_manifest(path).files, []
    for rank, found in enumerate(damaged):
        for name, theirs in found.items():
            try:
                verify(path, name, files[name])
            except CheckpointUnreadable:
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                continue
            raise CheckpointError(
                f"rank {rank} finds: {theirs}; but rank 0 finds that file whole. Mount the same {path.parent} for all "
                "ranks, and start again."
            )
    return "\n".join(reasons) or None


def check_files(path: Place, rank: int, ranks: int) -> Manifest:
    """Verifies this rank's share of the files. Raises CheckpointError."""
    manifest = read_manifest(path)
    for name in sorted(manifest.files)[rank::ranks]:
        verify(path, name, manifest.files[name])
    return manifest


def read_index(path: Place, manifest: Manifest) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name. Raises CheckpointError."""
    where = path / index.NAME
    if index.NAME not in manifest.files:
        raise CheckpointError(f"{path}: the manifest lists no {index.NAME}")
    verify(path, index.NAME, manifest.files[index.NAME])
    return index.decode(where.read_bytes(), str(where), manifest.files)


def load(path: Place, snapshot: Snapshot, *, some: bool = False) -> dict[str, Any]:
    """Fill the snapshot's tensors in place from a checkpoint of any layout; returns its facts. Collective. With
    ``some`` the checkpoint may hold more than is asked for.

    All files are checked first, each by one rank.

    Raises CheckpointError on every rank when a file is missing or damaged (names file, expected, found), when
    a tensor is missing, has another size or type or is asked for by no rank (names it); no tensor was touched
    then. Should the disk itself fail after the checks, tensors may be half filled.
    """

    def check() -> tuple[int, dict[str, Any]]:
        manifest = check_files(path, own_rank(), world_size())
        return manifest.step, manifest.facts

    def same(found: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                raise CheckpointError(
                    f"{path} is step {found[0][0]} for rank 0, but another checkpoint for rank {rank}"
                )
        return found

    _, facts = together(check, same)
    stored: dict[str, StoredTensor] = {}

    def fit() -> set[str]:
        stored.update(read_index(path, read_manifest(path)))
        table = snapshot.flat()
        raise_any(_misfits(table, stored))
        return set(table)

    def complete(asked: list[set[str]]) -> list[None]:
        forgotten = sorted(stored.keys() - set().union(*asked)) if not some else []
        raise_any(f"{name!r} is in the checkpoint, but no rank asks for it" for name in forgotten)
        return [None] * len(asked)

    together(fit, complete)
    together(lambda: _read(path, snapshot, stored), lambda nothings: nothings)
    return facts


def _misfits(table: dict[str, list[Piece]], stored: dict[str, StoredTensor]) -> Iterator[str]:
    for name, pieces in table.items():
        found = stored.get(name)
        if found is None:
            yield f"{name!r} is not in the checkpoint"
            continue
        for start, count in Counter(piece.start for piece in pieces).items():
            if count > 1:
                yield f"this rank has two pieces of {name!r} that start at {start}"
        for piece in pieces:
            if found.total != piece.total:
                yield f"{name!r} has {found.total} elements in the checkpoint, {piece.total} are expected"
            if found.dtype != piece.tensor.dtype:
                yield f"{name!r} is {found.dtype} in the checkpoint, {piece.tensor.dtype} is expected"


def _read(path: Place, snapshot: Snapshot, stored: dict[str, StoredTensor]) -> None:
    """Every piece from whatever chunks hold it, file by file and forward in each."""
    reads = []
    for name, pieces in snapshot.flat().items():
        for piece in pieces:
            end = piece.start + len(piece.tensor)
            for low, high, file, offset in stored[name].ranges(piece.start, end):
                reads.append((file, offset, piece.tensor.detach()[low - piece.start : high - piece.start]))
    with ExitStack() as stack:
        streams: dict[str, BinaryIO] = {}
        for file, offset, into in sorted(reads, key=lambda read: read[:2]):
            if file not in streams:
                streams[file] = stack.enter_context((path / file).open("rb"))
            read_range(streams[file], offset, into, str(path / file))
