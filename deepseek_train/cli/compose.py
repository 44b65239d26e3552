"""Command line -> ``RunConfig``: Hydra composes the YAML groups, our schema parses what comes out.

All problems are collected before anything is refused: misspelt override keys (with the nearest one that exists), wrong
types, then, in ``train.preflight``, rules between fields.
"""

from pathlib import Path
from typing import Any

import deepseek_train_configs
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepseek_train.config.check import check
from deepseek_train.config.credentials import holds_credentials
from deepseek_train.config.parse import ConfigError, Problem, known_keys, parse, unknown_key
from deepseek_train.config.schema import RunConfig

_FP8 = "precision.fp8."
CONFIG_DIR = Path(next(iter(deepseek_train_configs.__path__)))


def compose_config(overrides: list[str]) -> RunConfig:
    """The run that ``overrides`` ask for, on top of ``configs/config.yaml``. Raises ConfigError with every problem."""
    # Shares of the run in curves: ${tokens:0.1} is a tenth of train.total_tokens.
    OmegaConf.register_new_resolver("tokens", _share_of_tokens, replace=True)
    good, problems = _sort_out(overrides)
    problems += _of_fp8(good)
    try:
        config = _built(good)
    except ConfigError as error:
        wrong = [problem.where for problem in error.problems]
        raise ConfigError([*problems, *error.problems, *_of_the_rest(good, wrong)]) from error
    if problems:
        raise ConfigError([*problems, *check(config)])
    return config


def _built(overrides: list[str]) -> RunConfig:
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed: Any = OmegaConf.to_container(compose("config", overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([Problem("configuration", _first_line(error), "See configs/.")]) from error
    return parse(RunConfig, composed)


def _of_the_rest(overrides: list[str], wrong: list[str]) -> list[Problem]:
    """What the rules between fields say where values that cannot be parsed, those of the keys ``wrong``, are as if they
    had not been given: one mistake must not hide another. Nothing where that does not help."""
    kept = [text for text in overrides if not any(_sets(text, key) for key in wrong)]
    try:
        return check(_built(kept))
    except ConfigError:
        return []


def _of_fp8(overrides: list[str]) -> list[Problem]:
    """A key of the FP8 recipe must not turn FP8 on by the way."""
    keys = [text.removeprefix("++").partition("=")[0] for text in overrides if _FP8 in text.partition("=")[0]]
    try:
        if not keys or _built([text for text in overrides if _FP8 not in text]).precision.fp8 is not None:
            return []
    except ConfigError:
        return []  # said elsewhere
    return [Problem(key, "this run does not train in FP8", "Write precision=fp8 as well.") for key in keys]


def _sets(override: str, key: str) -> bool:
    """Whether an override gives a value to ``key``, or to what holds it."""
    name = override.removeprefix("++").partition("=")[0]
    return key == name or key.startswith((f"{name}.", f"{name}["))


def _share_of_tokens(share: float, *, _root_: Any) -> int:
    try:
        return round(float(share) * float(_root_.train.total_tokens))
    except ValueError:  # the schema will say what total_tokens should be
        return 0


def _sort_out(overrides: list[str]) -> tuple[list[str], list[Problem]]:
    """Overrides that Hydra can take, and the problems of the others."""
    parser, good, problems = OverridesParser.create(), [], []
    keys, groups = known_keys(RunConfig), [p.name for p in CONFIG_DIR.iterdir() if p.is_dir()]
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            mend = "Write key=value, for example parallel.pp=2; quote text that has signs in it: 'key=\"def f(x):\"'."
            problems.append(Problem(_shown(text), "not an override", mend))
            continue
        problem = _problem(override, keys, groups)
        if problem is not None:
            told = (
                Problem(_shown(text), "not an override", problem.mend) if holds_credentials(text) else problem
            )
            problems.append(told)
        elif override.type is OverrideType.CHANGE and override.key_or_group not in groups:
            good.append(f"++{text}")  # the schema knows the key, whether or not a YAML file mentions it
        else:
            good.append(text)
    return good, problems


def _shown(text: str) -> str:
    """An override in a message; without its value where that is nobody's business."""
    return f"{text.partition('=')[0]}=..." if holds_credentials(text) else text


def _problem(override: Override, keys: list[str], groups: list[str]) -> Problem | None:
    key = override.key_or_group
    if key in groups and isinstance(override.value(), str):
        choices = sorted(p.stem for p in (CONFIG_DIR / key).glob("*.yaml"))
        if override.value() in choices:
            return None
        return Problem(key, f"no {key} is called {override.value()!r}", f"There are: {', '.join(choices)}.")
    if key in keys:
        return None
    return unknown_key(key, keys + groups)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
