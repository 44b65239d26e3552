"""The folder of checkpoints: drafts, commits, which there are, which are set aside. Rank 0's business alone.

``step-00000100`` is a checkpoint when its manifest is valid. On a local disk ``step-00000100.tmp-*`` is a draft, or
what a killed save or deletion left: it counts for nothing and goes with the run's next one; ``step-00000100.replaced``
stands in for the moment in which a checkpoint of the same step takes its place. ``step-00000100.bad`` was found
damaged.

On an object store nothing is renamed: a folder without a manifest is a draft, and a step that is saved again goes to a
folder of its own, ``step-00000100.2``. Once that has its manifest the one before is superseded, and deleted.
"""

import logging
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from deepseek_train.checkpoint.errors import CheckpointError, CheckpointUnreadable, reason
from deepseek_train.checkpoint.manifest import NAME, Manifest, read_manifest, write_manifest
from deepseek_train.checkpoint.places import (
    Place,
    fsync_folder,
    is_there,
    listed,
    remove_folder,
    write_synced,
)

CHECKPOINTS = "checkpoints"  # the folder of a run's own, in the run folder
COMMITTED = re.compile(r"step-(\d{1,18})(?:\.(replaced|\d{1,9}))?")
RETIRED = "tmp-retired"  # what is being deleted, or was when its run was killed
_BAD = re.compile(r"step-.*\.bad(\.\d{1,9})?")
_DRAFT = re.compile(rf"step-\d+\.(?!{RETIRED})tmp-.*")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint with a valid manifest; its other files were not looked at."""

    path: Place
    step: int
    facts: dict[str, Any]
    superseded: bool = False  # by another one of its step, which was saved later


def layout_words(facts: dict[str, Any]) -> str:
    """Of the ranks that saved a checkpoint with these facts; empty where they do not say."""
    layout = facts.get("layout") or {}
    return " ".join(f"{key} {value}" for key, value in layout.items() if value is not False)


def sweep(root: Place, step: int) -> None:
    """Deletes the drafts that killed saves have left; on an object store those of ``step``, as they look like any save
    under way. For a run alone, which holds the lock of its folder: to anybody else they may be just that."""
    for leftover in [*_drafts(root, step)]:
        try:
            remove_folder(leftover)
        except OSError as error:  # what cannot go is no reason not to save
            log.warning("unfinished checkpoint %s could not be deleted: %s", leftover, error)


def new_draft(root: Place, step: int) -> Place:
    """An empty folder to write a checkpoint into."""
    if not isinstance(root, Path):
        last = max((again for at, again in map(_age, _folders(root)) if at == step), default=0)
        folder = root / (f"{_name(step)}.{last + 1}" if last else _name(step))
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    root.mkdir(parents=True, exist_ok=True)
    draft = root / f"{_name(step)}.tmp-{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    return draft


def commit(draft: Place, manifest: Manifest) -> Place:
    """Make the draft a checkpoint: manifest, one rename, all fsynced. No old one is lost at any moment."""
    write_manifest(draft, manifest)
    if not isinstance(draft, Path):
        return draft
    final = draft.with_name(_name(manifest.step))
    if is_there(final):
        aside = final.with_suffix(".replaced")
        if is_there(aside):
            remove_folder(aside)
        final.rename(aside)
    draft.rename(final)
    fsync_folder(final.parent)
    return final


def committed(root: Place) -> list[Found]:
    """All checkpoints with a valid manifest, the newest first. Raises CheckpointUnreadable: one that cannot be looked
    at may be the newest."""
    found: list[Found] = []
    for path in sorted(_folders(root), key=_age, reverse=True):
        try:
            manifest = read_manifest(path)
        except CheckpointUnreadable:
            raise
        except CheckpointError as error:
            log.warning("ignored: %s", error)
            continue
        superseded = bool(found) and found[-1].step == manifest.step
        found.append(Found(path, manifest.step, manifest.facts, superseded))
    return sorted(found, key=lambda one: one.step, reverse=True)


def newest(root: Place, step: int | None = None) -> Place | None:
    """The folder of the latest step (of ``step`` at most) with a valid manifest; None where there is none. Its files
    were not looked at."""
    return next((found.path for found in committed(root) if step is None or found.step <= step), None)


def found_at(path: Place) -> list[Found]:
    """``path`` itself, where it is a checkpoint with a valid manifest. Raises CheckpointError where that is damaged,
    OSError where the disk does not say."""
    if not is_there(path / NAME):
        return []
    manifest = read_manifest(path)
    return [Found(path, manifest.step, manifest.facts)]


def set_aside(path: Place, why: str) -> Place:
    """Makes a damaged checkpoint be none, and keeps it to be looked at; returns where it is."""
    write_synced(path / "why-bad.txt", f"{why}\n".encode())
    if not isinstance(path, Path):
        manifest = path / NAME
        if is_there(manifest):
            (path / f"{NAME}.bad").write_bytes(manifest.read_bytes())
            manifest.unlink()
        return path
    names = chain([f"{path.name}.bad"], (f"{path.name}.bad.{again}" for again in count(2)))
    return path.rename(next(aside for name in names if not is_there(aside := path.with_name(name))))


def set_aside_in(root: Place) -> list[Place]:
    """What ``set_aside`` has left."""
    found = listed(root)
    if isinstance(root, Path):
        return [path for path in found if _BAD.fullmatch(path.name)]
    return [path for path in found if is_there(path / f"{NAME}.bad")]


def half_deleted(root: Place) -> list[Place]:
    """What a killed deletion left on a local disk. ``sweep`` must not touch it: another thread may be at it."""
    return [*root.glob(f"step-*.{RETIRED}*")] if isinstance(root, Path) else []


def without_manifest(root: Place) -> list[tuple[Place, str]]:
    """Local folders that bear a checkpoint's name and have no valid manifest, with the reason. On an object store those
    are drafts."""
    if not isinstance(root, Path):
        return []
    found = []
    for path in _folders(root):
        try:
            read_manifest(path)
        except CheckpointUnreadable:
            raise
        except CheckpointError as error:
            found.append((path, str(error)))
    return found


def _folders(root: Place) -> list[Place]:
    try:
        return [path for path in listed(root) if COMMITTED.fullmatch(path.name)]
    except OSError as error:
        raise CheckpointUnreadable(
            f"{root} cannot be looked at: {reason(error)}. See to the disk, and try again."
        ) from error


def _age(path: Place) -> tuple[int, int]:
    """Of a checkpoint by its name: the step, and which of that step it is."""
    step, again = COMMITTED.fullmatch(path.name).groups()  # type: ignore[union-attr]  # _folders sees to it
    return int(step), 0 if again == "replaced" else int(again or 1)


def _drafts(root: Place, step: int) -> Iterator[Place]:
    if isinstance(root, Path):
        yield from (path for path in listed(root) if _DRAFT.fullmatch(path.name))
        return
    yield from (path for path in _folders(root) if _age(path)[0] == step and _is_draft(path))


def _is_draft(path: Place) -> bool:
    """On an object store. What cannot be looked at is none: it may be a checkpoint."""
    kept = NAME, f"{NAME}.bad"  # a checkpoint, and one that was set aside
    try:
        return not any(is_there(path / name) for name in kept)
    except OSError:
        return False


def _name(step: int) -> str:
    return f"step-{step:08}"
