"""The run folder: what lies where, and starting afresh without losing the old run."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from upath import UPath

from deepseek_train.checkpoint.finder import CONFIG_FILE
from deepseek_train.checkpoint.folders import CHECKPOINTS
from deepseek_train.checkpoint.places import Place, is_there
from deepseek_train.config.schema import RunConfig
from deepseek_train.data.manifest import TOKENIZER_FILE

METRICS_FILE = "metrics.jsonl"
HANGS = "hangs"
OUTCOME_FILE = "outcome"  # how the last session ended; see config.exit_codes
SAVED_FILE = "saved"  # which checkpoint came last, and where it is


class RunFolderFailed(OSError):
    """The run folder cannot be written. One text, as ranks tell each other."""


@contextmanager
def run_folder_told(folder: Path) -> Iterator[None]:
    """OSErrors of the block as RunFolderFailed, with what to do."""
    try:
        yield
    except OSError as error:
        raise RunFolderFailed(
            f"the run folder {folder} cannot be written: {error}. Make room or mend the disk; the same command then "
            "goes on from the last checkpoint."
        ) from error


def checkpoints_of(config: RunConfig, folder: Path) -> Place:
    """Where the run's checkpoints are."""
    return UPath(config.checkpoint.path) if config.checkpoint.path else folder / CHECKPOINTS


def config_yaml(config: RunConfig) -> str:
    """The resolved configuration as text."""
    return yaml.safe_dump(_lists(asdict(config)), sort_keys=False, allow_unicode=True)


def open_folder(config: RunConfig) -> Path:
    """Makes the run folder. With resume=never an existing run is moved aside."""
    folder = Path(config.run_dir)
    if config.resume == "never" and any(is_there(folder / name) for name in (CONFIG_FILE, SAVED_FILE)):
        folder.rename(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME_FILE).unlink(missing_ok=True)  # an earlier session's
    _write(
        folder / TOKENIZER_FILE, (Path(config.data.path) / TOKENIZER_FILE).read_bytes()
    )  # for exports, samples
    return folder


def write_config(config: RunConfig, folder: Path) -> None:
    """Keeps the resolved configuration in the run folder."""
    _write(folder / CONFIG_FILE, config_yaml(config).encode())


def keep_config(config: RunConfig, folder: Path) -> str:
    """Writes the configuration in place of the last session's; returns what has changed of the run's length, which
    nothing else tells. Empty: nothing."""
    before, now = _total_tokens(folder), config.train.total_tokens
    write_config(config, folder)
    if before in (None, now):
        return ""
    return (
        f"train.total_tokens was {before}, is {now}: curves that are shares of it are other ones from here on"
    )


def _total_tokens(folder: Path) -> Any:
    """As the last session had it; None where it does not say."""
    try:
        return read_config(folder)["train"]["total_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """What ``write_config`` wrote. Raises ValueError where it is something else, OSError."""
    path = folder / CONFIG_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        raise ValueError(f"{path} is no run's configuration: it has no group 'data'")
    return content


def note_outcome(folder: Path, *, complete: bool, step: int) -> None:
    """For whoever starts runs again: both ways of ending leave with exit code 0."""
    word = "complete" if complete else "stopped"
    (folder / OUTCOME_FILE).write_text(f"{word} after step {step}\n", encoding="utf-8")


def note_saved(folder: Path, step: int, path: Place) -> None:
    """For later sessions: where its checkpoints cannot be seen, a run must not begin anew."""
    _write(folder / SAVED_FILE, f"step {step} was saved at {path}\n".encode())


def saved_before(folder: Path) -> str:
    """What ``note_saved`` wrote last; empty where the run has no checkpoint yet."""
    try:
        return (folder / SAVED_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def as_json(config: Any) -> Any:
    """A configuration as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(asdict(config)))


def _write(path: Path, content: bytes) -> None:
    """Killed meanwhile, or on a full disk, it leaves what was there."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_bytes(content)
    draft.replace(path)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, tuple | list) else value
