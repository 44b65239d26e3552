"""Where checkpoints lie: a local folder, or whatever fsspec reaches by a URL; ``UPath`` makes one of both.

On a local disk a folder appears by one rename and everything is fsynced. An object store has neither: there the
manifest, put last, makes a folder a checkpoint.
"""

import os
import shutil
from pathlib import Path

from upath import UPath

Place = Path | UPath


def write_synced(path: Place, content: bytes) -> None:
    """Writes a small file; on a local disk it outlives a power cut once its folder is fsynced."""
    with path.open("wb") as stream:
        stream.write(content)
        if isinstance(path, Path):
            stream.flush()
            os.fsync(stream.fileno())


def fsync_folder(folder: Place) -> None:
    """Makes renames and new names in a local folder survive a power cut."""
    if not isinstance(folder, Path):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Place) -> None:
    """Deletes a folder and all in it; the manifest goes first, so that half a checkpoint looks like none."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        manifest.unlink()
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.rmdir(recursive=True)


def free_bytes(folder: Place) -> int | None:
    """Space left on a local disk; None where nobody can say."""
    return shutil.disk_usage(folder).free if isinstance(folder, Path) else None
