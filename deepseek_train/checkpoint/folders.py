"""The folder of checkpoints: drafts, commits, which is the newest, which go. Rank 0's business alone.

``step-00000100`` is a checkpoint when its manifest is valid. ``step-00000100.tmp-*`` is a draft, or what a
killed save or deletion left; it counts for nothing and goes with the next save. ``step-00000100.replaced``
stands in for the moment in which a checkpoint of the same step takes its place.
"""

import logging
import re
import shutil
import uuid
from pathlib import Path

from deepseek_train.checkpoint.agree import CheckpointError
from deepseek_train.checkpoint.manifest import Manifest, fsync_folder, read_manifest, write_manifest

COMMITTED = re.compile(r"step-(\d+)(\.replaced)?")
log = logging.getLogger(__name__)


def new_draft(root: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into, in place of whatever drafts are left there."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # what cannot go is no reason not to save
    draft = root / f"step-{step:08}.tmp-{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    return draft


def commit(draft: Path, manifest: Manifest) -> Path:
    """Make the draft a checkpoint: manifest, one rename, all fsynced. No old one is lost at any moment."""
    write_manifest(draft, manifest)
    final = draft.parent / f"step-{manifest.step:08}"
    if final.exists():
        aside = final.with_suffix(".replaced")
        if aside.exists():
            shutil.rmtree(aside)
        final.rename(aside)
    draft.rename(final)
    fsync_folder(final.parent)
    return final


def committed(root: Path) -> list[Path]:
    """All valid checkpoints, the newest first."""
    found = []
    for path in root.glob("step-*") if root.is_dir() else ():
        name = COMMITTED.fullmatch(path.name)
        if name is None:
            continue
        try:
            read_manifest(path)
        except CheckpointError as error:
            log.warning("ignored: %s", error)
            continue
        found.append((int(name[1]), name[2] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def retire(root: Path, latest: Path, keep: int) -> None:
    """Delete all checkpoints but the ``keep`` newest; ``latest`` is one of those, whatever its step.

    What cannot be deleted stays, with a warning: a full checkpoint more is no reason to stop a run.
    """
    others = [path for path in committed(root) if path != latest]
    gone = [path for path in others if path.suffix]
    gone += [path for path in others if not path.suffix][keep - 1 :]
    for path in gone:
        try:
            # renamed first: half a checkpoint must not look like one
            shutil.rmtree(path.rename(path.with_name(f"{path.stem}.tmp-retired{path.suffix}")))
        except OSError as error:
            log.warning("old checkpoint %s could not be deleted: %s", path, error)
