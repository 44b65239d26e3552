"""``key=value`` arguments to a dataclass of plain fields."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class UsageError(ValueError):
    """Arguments that cannot be understood: ``problems`` holds every one of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def parse_key_values(
    kind: type[T], arguments: Sequence[str], check: Callable[[T], Sequence[str]], prefix: str = ""
) -> T:
    """A ``kind`` (dataclass of str, int, float, or one of these or None) from ``[prefix]key=value``.

    ``check`` returns what is wrong with the values themselves.

    Raises:
        UsageError: unknown, repeated or missing keys, and wrong values; all at once.
    """
    known: dict[str, Any] = {field.name: field for field in fields(kind)}
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    values: dict[str, Any] = {}
    named: set[str] = set()
    problems = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        name = key.removeprefix(prefix)
        if not equals:
            problems.append(f"'{argument}' is not of the form key=value")
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known keys: {' '.join(known)}"
            problems.append(f"there is no key '{key}'; {hint}")
        elif name in named:
            problems.append(f"'{prefix}{name}' is given twice")
        else:
            named.add(name)
            try:
                values[name] = _convert(text, known[name].type)
            except ValueError as error:
                problems.append(f"{prefix}{name}={text}: {error}")
    missing = [name for name in required if name not in values]
    problems += [
        f"'{prefix}{name}' is missing; write {prefix}{name}=.." for name in missing if name not in named
    ]
    if missing:
        raise UsageError(problems)
    parsed = kind(**values)
    problems += check(parsed)
    if problems:
        raise UsageError(problems)
    return parsed


def _convert(text: str, kind: Any) -> Any:
    accepted = get_args(kind) or (kind,)
    if NoneType in accepted and text.lower() in ("none", "null"):
        return None
    to = next(option for option in accepted if option is not NoneType)
    if to is str and not text:
        raise ValueError("the value is empty")
    try:
        return to(text)
    except ValueError as error:
        noun = {int: "a whole number", float: "a number"}[to]
        raise ValueError(f"not {noun}{' or null' if NoneType in accepted else ''}") from error
