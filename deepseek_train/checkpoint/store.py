"""Save, find and load checkpoints. All or nothing: a checkpoint is complete and verified, or it does not
exist.

Saving: a draft folder, every rank's files with their checksums, the manifest last, one rename. Loading:
checksums of all files, then the plan of who reads what, then the tensors.
"""

import shutil
from pathlib import Path
from typing import Any

from deepseek_train.checkpoint.agree import CheckpointError, on_first, own_rank, together, world_size
from deepseek_train.checkpoint.folders import commit, committed, new_draft, retire
from deepseek_train.checkpoint.manifest import Manifest, read_manifest, verify
from deepseek_train.checkpoint.pieces import Snapshot, Summary, check_agreement
from deepseek_train.checkpoint.transfer import read_tensors, write_tensors


def save(root: Path, step: int, snapshot: Snapshot, *, keep: int) -> Path:
    """Write all ranks' snapshots as the checkpoint of ``step`` in ``root``, a folder that all ranks see.
    Collective.

    Then all but the newest ``keep`` checkpoints are deleted. Returns the new checkpoint's folder.

    Raises CheckpointError on every rank when it fails on any: pieces that overlap or leave gaps, replicated
    tensors or facts that differ between ranks, a disk that is full or not writable. Older checkpoints are as
    before then.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: the checkpoint just saved is always kept; write 1 or more")

    def open_draft(summaries: list[Summary]) -> list[Path]:
        check_agreement(summaries)
        return [new_draft(root, step)] * len(summaries)

    draft = together(lambda: snapshot.summary(step), open_draft)
    try:
        files = write_tensors(draft, snapshot)
        final = on_first(lambda: commit(draft, Manifest(step, snapshot.facts, files)))
    except CheckpointError:  # on all ranks: nobody writes any more
        if own_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)  # what stays goes with the next save
        raise
    on_first(lambda: retire(root, final, keep))
    return final


def newest(root: Path, step: int | None = None) -> Path | None:
    """The folder of the latest step, of ``step`` at most, with a valid manifest; None where there is none. Not
    collective: several ranks that ask a busy file system may hear several answers, so let one ask and tell."""
    return next((p for p in committed(root) if step is None or read_manifest(p).step <= step), None)


def load(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Fill the snapshot's tensors in place from a checkpoint of any layout; returns its facts. Collective.

    All files are checked first, each by one rank.

    Raises CheckpointError on every rank when a file is missing or damaged (names file, expected, found), when
    a tensor is missing, has another size or type or is asked for by no rank (names it); no tensor was touched
    then. Should the disk itself fail after the checks, tensors may be half filled.
    """

    def check() -> tuple[int, dict[str, Any]]:
        manifest = read_manifest(path)
        for name in sorted(manifest.files)[own_rank() :: world_size()]:
            verify(path, name, manifest.files[name])
        return manifest.step, manifest.facts

    def same(found: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                raise CheckpointError(
                    f"{path} is step {found[0][0]} for rank 0, but another checkpoint for rank {rank}"
                )
        return found

    _, facts = together(check, same)
    read_tensors(path, snapshot)
    return facts
