"""``key=value`` arguments to a dataclass of plain fields, or of such dataclasses (``times.forward=1``)."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

EXAMPLE = "example"  # in the metadata of a required field: a value, as a user would write it

T = TypeVar("T", bound="DataclassInstance")


def like(example: str) -> Any:
    """A required field; where it is missing the message shows ``example``."""
    return field(metadata={EXAMPLE: example})


class UsageError(ValueError):
    """Arguments that cannot be understood: ``problems`` holds every one of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def parse_key_values(
    kind: type[T], arguments: Sequence[str], check: Callable[[T], Sequence[str]], prefix: str = ""
) -> T:
    """A ``kind`` (dataclass of str, int, float, bool, ``float | tuple[float, ...]`` written 1.5 or [1,2,1], or one of
    these or None; a field that is itself such a dataclass has keys ``field.key``) from ``[prefix]key=value``.

    ``check`` returns what is wrong with the values themselves.

    Raises:
        UsageError: unknown, repeated or missing keys, and wrong values; all at once.
    """
    known = dict(_leaves(kind))
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
        f"'{prefix}{name}' is missing; write {prefix}{name}={known[name].metadata.get(EXAMPLE, '..')}"
        for name in missing
        if name not in named
    ]
    if missing:
        raise UsageError(problems)
    parsed: T = _build(kind, values)
    problems += check(parsed)
    if problems:
        raise UsageError(problems)
    return parsed


def _leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    for one in fields(kind):
        if is_dataclass(one.type):
            yield from _leaves(one.type, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, one


def _build(kind: Any, values: dict[str, Any], prefix: str = "") -> Any:
    made = {}
    for one in fields(kind):
        if is_dataclass(one.type):
            made[one.name] = _build(one.type, values, f"{prefix}{one.name}.")
        elif prefix + one.name in values:
            made[one.name] = values[prefix + one.name]
    return kind(**made)


def _convert(text: str, kind: Any) -> Any:
    accepted = get_args(kind) or (kind,)
    if NoneType in accepted and text.lower() in ("none", "null"):
        return None
    lists = any(get_origin(option) is tuple for option in accepted)
    to = next(option for option in accepted if option is not NoneType and get_origin(option) is not tuple)
    if to is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("write true or false")
        return text.lower() == "true"
    if to is str and not text:
        raise ValueError("the value is empty")
    try:
        if lists and text[:1] + text[-1:] == "[]":
            return tuple(to(part) for part in text[1:-1].split(","))
        return to(text)
    except ValueError as error:
        noun = {int: "a whole number", float: "a number"}[to]
        also = (", nor a list like [1,2,1]" if lists else "") + (" or null" if NoneType in accepted else "")
        raise ValueError(f"not {noun}{also}") from error
