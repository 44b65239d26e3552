"""Plain nested mappings (what YAML and Hydra give) -> frozen dataclasses, strictly and all problems at once.

An unknown key names its nearest neighbour; a wrong type says what was expected. Numbers written as text that YAML
leaves alone (``1e-4``, ``1e12`` for an int field) are accepted when they lose nothing.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Something wrong in the configuration, and what to write instead."""

    where: str  # dotted key
    what: str
    mend: str
    storage: bool = False  # a disk's failure (``config.storage``), which may be gone the next time

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.mend}"


class ConfigError(ValueError):
    """All problems of one configuration."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))

    @property
    def storage(self) -> bool:
        """Whether only disks have failed."""
        return all(problem.storage for problem in self.problems)


_EXAMPLES = {
    int: "Write a whole number, as 4 or 2e4.",
    float: "Write 0.1 or 1e-4.",
    bool: "Write true or false.",
}

_FAILED = object()  # stands for a value that could not be built; its problem has been noted


def parse(kind: type[T], value: Mapping[str, Any]) -> T:
    """Builds ``kind`` from ``value``. Raises ConfigError with every problem found."""
    problems: list[Problem] = []
    built = _dataclass(kind, value, "", problems)
    if problems:
        raise ConfigError(problems)
    return built


def known_keys(kind: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass type, groups included."""
    keys: list[str] = []
    for name, hint in get_type_hints(kind).items():
        keys.append(prefix + name)
        may_be_null = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        for group in filter(is_dataclass, may_be_null):
            keys += known_keys(group, f"{prefix}{name}.")
    return keys


def unknown_key(key: str, candidates: list[str]) -> Problem:
    """The problem for a key that does not exist."""
    # A right name in a wrong group is as likely as a misspelt one: compare whole keys and last parts.
    last = key.rsplit(".", 1)[-1]
    near = get_close_matches(key, candidates, 1, 0.7) or [
        c for c in candidates if c.rsplit(".", 1)[-1] == last
    ]
    near = near or get_close_matches(last, [c for c in candidates if "." not in c], 1, 0.5)
    mend = f"Did you mean '{near[0]}'?" if near else "`deepseek-train --cfg` prints every key."
    return Problem(key, "no such key", mend)


def _dataclass(kind: Any, value: Any, where: str, problems: list[Problem]) -> Any:
    if not isinstance(value, Mapping):
        names = [f"{where}.{name}=..." for name in get_type_hints(kind)]
        mend = f"It has keys of its own: {', '.join(names[:3] if len(names) < 4 else names[:1])}"
        problems.append(Problem(where, f"expected a group of keys, found {value!r}", mend))
        return _FAILED
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    candidates = [prefix + key for key in hints]
    problems += [unknown_key(prefix + str(key), candidates) for key in value if key not in hints]
    built = {}
    for one in fields(kind):
        if one.name in value:
            built[one.name] = _value(hints[one.name], value[one.name], prefix + one.name, problems)
        elif _required(one):
            problems.append(Problem(prefix + one.name, "missing", "Give it a value; it has no default."))
            built[one.name] = _FAILED
    return _FAILED if _FAILED in built.values() else kind(**built)


def _required(one: Field[Any]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _value(hint: Any, value: Any, where: str, problems: list[Problem]) -> Any:
    if is_dataclass(hint):
        return _dataclass(hint, value, where, problems)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        if value is None and NoneType in args:
            return None
        return _value(next(a for a in args if a is not NoneType), value, where, problems)
    if origin is Literal:
        return _choice(args, value, where, problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(Problem(where, f"expected a list, found {value!r}", "Write it as [..., ...]."))
            return _FAILED
        items = tuple(_value(args[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
        return _FAILED if _FAILED in items else items
    scalar = _scalar(hint, value)
    if scalar is _FAILED:
        problems.append(
            Problem(
                where,
                f"expected {hint.__name__}, found {value!r}",
                _EXAMPLES.get(hint, "Give another value."),
            )
        )
    return scalar


def _choice(choices: tuple[Any, ...], value: Any, where: str, problems: list[Problem]) -> Any:
    if value is False and "off" in choices:  # YAML 1.1 reads a bare `off` as false
        value = "off"
    if value in choices:
        return value
    near = get_close_matches(str(value), [str(c) for c in choices], 1)
    hint = f"Did you mean '{near[0]}'?" if near else "Choose one of them."
    problems.append(Problem(where, f"{value!r} is not one of {', '.join(map(str, choices))}", hint))
    return _FAILED


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else _FAILED
    if kind is str:
        return str(value) if isinstance(value, str | int | float) else _FAILED
    if value is None:
        return _FAILED
    try:
        number = float(value)
        if kind is float:
            return number
        if isinstance(value, int):
            return value
        return int(number) if number.is_integer() else _FAILED
    except (TypeError, ValueError, OverflowError):
        return _FAILED
