"""Where checkpoints lie: a local folder, or whatever fsspec reaches by a URL; ``UPath`` makes one of both.

On a local disk a folder appears by one rename and everything is fsynced. An object store has neither: there the
manifest, put last, makes a folder a checkpoint.
"""

import os
import shutil
from pathlib import Path

from upath import UPath

Place = Path | UPath


def is_there(path: Place) -> bool:
    """Whether there is a file or a folder of this name. Raises OSError where the disk does not say: ``exists``,
    ``is_file`` and ``is_dir`` of an object store answer no to that, and what is whole would count as gone."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def listed(folder: Place) -> list[Place]:
    """What is in a folder; nothing where there is none. Raises OSError where the disk does not say."""
    try:
        if isinstance(folder, Path):
            return [*folder.iterdir()]
        names = [name.rstrip("/") for name in folder.fs.ls(folder.path, detail=False)]  # iterdir asks is_dir
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name.rpartition("/")[2] for name in names]


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
    if is_there(manifest):
        manifest.unlink()
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.rmdir(recursive=True)


def free_bytes(folder: Place) -> int | None:
    """Space left on a local disk; None where nobody can say."""
    return shutil.disk_usage(folder).free if isinstance(folder, Path) else None
