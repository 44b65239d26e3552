"""What a user means by a place: a checkpoint, a folder of checkpoints, or a run that keeps them somewhere. Needs no
torch; ``stored.newest_whole`` and ``train.begin`` look into the files of what is found.
"""

import yaml
from upath import UPath

from deepseek_train.checkpoint.errors import NoCheckpoint
from deepseek_train.checkpoint.folders import CHECKPOINTS, Found, committed, found_at
from deepseek_train.checkpoint.manifest import NAME
from deepseek_train.checkpoint.places import Place, is_there

CONFIG_FILE = "config.yaml"  # of a run, in its folder


def candidates(place: Place) -> list[Found]:
    """``place`` itself if it is a checkpoint, else all checkpoints in it, or of the run it is, the newest first. Only
    manifests were looked at. Raises NoCheckpoint, CheckpointError, OSError."""
    if itself := found_at(place):
        return itself
    root = checkpoints_at(place)
    found = committed(root)
    if not found:
        raise NoCheckpoint(
            f"{root} holds no checkpoint: there is no {NAME}, nor a folder step-... that has one"
        )
    return found


def checkpoints_at(place: Place) -> Place:
    """Of a run the folder of its checkpoints (``checkpoint.path``, else its own), else ``place``."""
    elsewhere = _path_of_run(place / CONFIG_FILE)
    if elsewhere is not None:
        return UPath(elsewhere)
    return place / CHECKPOINTS if is_there(place / CHECKPOINTS) else place


def _path_of_run(config: Place) -> str | None:
    """None also where the file is damaged: the run's own folder may have checkpoints all the same."""
    if not is_there(config):
        return None
    try:
        path = yaml.safe_load(config.read_text(encoding="utf-8"))["checkpoint"]["path"]
    except (IsADirectoryError, yaml.YAMLError, ValueError, KeyError, TypeError):
        return None
    return str(path) if path else None
