"""Expert loads for ``deepseek-placement``: from a run, or from a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepseek_train.checkpoint.finder import CONFIG_FILE
from deepseek_train.cli.key_value import UsageError
from deepseek_train.monitor.jsonl import read_history
from deepseek_train.train.folder import METRICS_FILE


@dataclass(frozen=True)
class ExpertLoads:
    """Tokens of each expert, of each MoE layer in ascending order, and where they are from, in words."""

    by_layer: Mapping[int, tuple[float, ...]]
    source: str


def loads_of_run(folder: Path, steps: int) -> ExpertLoads:
    """The sum of what the last ``steps`` steps kept. Raises UsageError where there is none."""
    path = folder / METRICS_FILE
    try:
        taken = read_history(path).steps
    except OSError as error:
        mend = "write the folder of a run, as run=runs/tiny, or load=FILE.json"
        raise UsageError([f"run={folder}: {path.name}: {error.strerror}; {mend}"]) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError([f"run={folder}: {path.name} is not what a run writes: {error}"]) from error
    with_load = [step for step in taken if step.expert_load]
    kept = [step for step in with_load if step.step > taken[-1].step - steps]
    if not with_load:
        why = f"none of the {len(taken)} steps in {path.name} has expert loads"
        raise UsageError([f"run={folder}: {why}; take a run of a model with MoE layers, or load=FILE.json"])
    if not kept:
        back = taken[-1].step - with_load[-1].step + 1
        why = f"run={folder} kept no loads of its last {steps} steps"
        raise UsageError([f"steps={steps}: {why}; write steps={back} or more"])
    layers = sorted(kept[-1].expert_load)
    sums = {n: tuple(map(sum, zip(*(s.expert_load[n] for s in kept), strict=True))) for n in layers}
    span = f"steps {kept[0].step} to {kept[-1].step}" if len(kept) > 1 else f"step {kept[0].step}"
    return ExpertLoads(sums, f"{span} of {folder} ({len(kept)} with loads)")


def groups_of_run(folder: Path) -> int:
    """Expert groups of the model. Raises UsageError where its configuration does not say."""
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        groups = config["model"]["num_expert_groups"]
    except OSError as error:
        why = f"{CONFIG_FILE}: {error.strerror}"
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        why = f"{CONFIG_FILE} has no model.num_expert_groups"
    else:
        if isinstance(groups, int):
            return groups
        why = f"{CONFIG_FILE}: model.num_expert_groups is {groups!r}, not a whole number"
    raise UsageError([f"run={folder}: {why}; write it as groups=8"])


def loads_of_file(path: Path) -> ExpertLoads:
    """``{"layer": [tokens of each expert]}``. Raises UsageError with everything that is wrong with its form."""
    form = 'write {"3": [tokens of each expert], "4": [..]}'
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError([f"load={path}: {error.strerror}; {form} there, or run=FOLDER"]) from error
    except ValueError as error:
        raise UsageError([f"load={path}: not JSON ({error}); {form}"]) from error
    if not isinstance(found, dict):
        raise UsageError([f"load={path}: not an object of layers; {form}"])
    problems = [f"load={path}: '{n}' is no number of a layer; {form}" for n in found if not n.isdecimal()]
    problems += [
        f"load={path}: layer {n} is not a list of numbers; {form}"
        for n, load_E in found.items()
        if not (isinstance(load_E, list) and all(map(_is_number, load_E)))
    ]
    if problems:
        raise UsageError(problems)
    by_layer = {int(n): tuple(load_E) for n, load_E in sorted(found.items(), key=lambda item: int(item[0]))}
    return ExpertLoads(by_layer, str(path))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
