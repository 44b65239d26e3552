"""The run folder: what lies where, and starting afresh without losing the old run."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from deepseek_train.config.schema import RunConfig

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
HANGS = "hangs"
OUTCOME_FILE = "outcome"  # how the last session ended; see config.exit_codes


def config_yaml(config: RunConfig) -> str:
    """The resolved configuration as text."""
    return yaml.safe_dump(_lists(asdict(config)), sort_keys=False, allow_unicode=True)


def open_folder(config: RunConfig) -> Path:
    """Makes the run folder. With resume=never an existing run is moved aside."""
    folder = Path(config.run_dir)
    if config.resume == "never" and (folder / CONFIG_FILE).exists():
        folder.rename(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def note_outcome(folder: Path, *, complete: bool, step: int) -> None:
    """For whoever starts runs again: both ways of ending leave with exit code 0."""
    word = "complete" if complete else "stopped"
    (folder / OUTCOME_FILE).write_text(f"{word} after step {step}\n", encoding="utf-8")


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, tuple | list) else value
