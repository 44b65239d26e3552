"""What a run finds where it is to write, and the weights it begins with: read before a process group starts."""

import tempfile
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from upath import UPath

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.finder import CONFIG_FILE, candidates
from deepseek_train.checkpoint.folders import newest
from deepseek_train.checkpoint.hf_config import CONFIG as HF_CONFIG
from deepseek_train.checkpoint.places import is_there
from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.config.storage import storage_failed
from deepseek_train.train.folder import as_json, checkpoints_of, config_yaml, read_config

# Any layout and any schedule read any checkpoint; a model is its own shape, and its data in their order.
_FIXED_ON_RESUME = ("model", "precision", "seed", "data")


def _nearest(folder: Path) -> Path:
    """``folder``, or what there is already of the way to it."""
    return folder if folder.exists() else _nearest(folder.parent)


def folder_problems(config: RunConfig) -> list[Problem]:
    """Whether the run can write where it is to write, and go on with what is there already."""
    folder = Path(config.run_dir)
    # The run's lock lies beside its folder.
    written = {_nearest(one): "run_dir" for one in (folder, folder.absolute().parent)}
    try:
        checkpoints = checkpoints_of(config, folder)
        there = is_there(checkpoints)
        if config.checkpoint.path and isinstance(checkpoints, Path):
            written[_nearest(checkpoints)] = "checkpoint.path"
    except (ImportError, ValueError, OSError) as error:
        mend = "Name a folder, or a URL that fsspec and its packages here know; null: the run folder's own."
        what = f"{config.checkpoint.path} cannot be looked at: {error}"
        return [Problem("checkpoint.path", what, mend, storage_failed(error))]
    for needed, key in written.items():
        try:
            with tempfile.TemporaryFile(dir=needed):
                pass
        except OSError as error:
            what = f"cannot write to {needed}: {error.strerror}"
            return [Problem(key, what, f"Choose a folder that is yours: {key}=...", storage_failed(error))]
    return [] if config.resume == "never" else _of_the_run_before(config, folder, there)


def _of_the_run_before(config: RunConfig, folder: Path, there: bool) -> list[Problem]:
    """What cannot be gone on with. ``there``: its checkpoints' folder."""
    if not there or not (folder / CONFIG_FILE).is_file():
        if config.resume == "must":
            return [
                Problem("resume", f"{folder} holds no checkpoint", "Use resume=auto, or another run_dir.")
            ]
        return []
    try:
        before = read_config(folder)
    except (ValueError, OSError) as error:
        mend = (
            f"Delete {folder / CONFIG_FILE} to go on as this command says, or start afresh with resume=never."
        )
        return [Problem("run_dir", str(error), mend, storage_failed(error))]
    now: dict[str, Any] = yaml.safe_load(config_yaml(config))
    for group, kind in get_type_hints(RunConfig).items():
        if is_dataclass(kind) and isinstance(
            before.get(group), dict
        ):  # fields that the older run did not know
            unset = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
            before[group] = unset | before[group]
    for groups in (before, now):  # data may have moved; that they are the same is checked by their hash
        for name in ("path", "allow_change", *(["source"] if config.data.source is None else [])):
            groups["data"].pop(name, None)
    fixed = [group for group in _FIXED_ON_RESUME if group != "data" or not config.data.allow_change]
    changed = [group for group in fixed if before.get(group) != now[group]]
    return [
        Problem(
            group,
            f"differs from the run in {folder} ({_difference(before.get(group), now[group])})",
            "Set it back to go on with that run, use another name=..., or start afresh with resume=never"
            + (", or go on with other data by data.allow_change=true." if group == "data" else "."),
        )
        for group in changed
    ]


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        return ", ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in keys[:4])
    return f"was {before}, is {now}"


def init_problems(config: RunConfig) -> list[Problem]:
    """Whether the weights that a new run is to begin with are there, and of its model. A run that has a checkpoint of
    its own begins with that one."""
    if config.init_from is None:
        return []
    mend = "Name a checkpoint, or a run or a folder of deepseek-convert that has one."
    try:
        if config.resume != "never" and newest(checkpoints_of(config, Path(config.run_dir))) is not None:
            return []
        if is_there(UPath(config.init_from) / HF_CONFIG):
            what = f"{config.init_from} is a folder in Hugging Face's layout"
            convert = (
                f"deepseek-convert from_hf source={config.init_from} target=FOLDER, and init_from=FOLDER."
            )
            return [Problem("init_from", what, convert)]
        newest_there = candidates(UPath(config.init_from))[0]
    except (CheckpointError, ImportError, ValueError, OSError) as error:
        return [Problem("init_from", str(error), mend, storage_failed(error))]
    ours, path, theirs = as_json(config.model), newest_there.path, newest_there.facts.get("model")
    if not isinstance(theirs, dict):
        return [Problem("init_from", f"{path} does not say of which model it is", mend)]
    shape = ours.keys() - {
        "name",
        "init_std",
        "embed_init_std",
        "rope_theta",
        "yarn",
    }  # which may be others now
    pairs = {key: theirs.get(key) for key in shape}, {key: ours[key] for key in shape}
    if pairs[0] == pairs[1]:
        return []
    what = f"the model of {path} is another one ({_difference(*pairs)})"
    return [Problem("init_from", what, "Use the same sizes: model=..., or its config.yaml's.")]
