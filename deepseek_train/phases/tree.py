"""Tensors inside the frozen dataclasses that flow between phases."""

from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor


@cache
def _names(kind: Hashable) -> tuple[str, ...]:
    """Field names of a dataclass, none for any other type."""
    return tuple(one.name for one in fields(kind)) if is_dataclass(kind) else ()


def differentiable(value: Any) -> list[Tensor]:
    """The tensors in ``value`` that require a gradient, in field order. Looks into dataclasses and tuples."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, tuple):
        return [t for item in value for t in differentiable(item)]
    return [t for name in _names(value.__class__) for t in differentiable(getattr(value, name))]


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """``value`` with its differentiable tensors, in the order of ``differentiable``, taken from ``tensors``."""
    if isinstance(value, Tensor):
        return next(tensors) if value.requires_grad else value
    if isinstance(value, tuple):
        return tuple(with_tensors(item, tensors) for item in value)
    changed = {}
    for name in _names(value.__class__):
        old = getattr(value, name)
        new = with_tensors(old, tensors)
        if new is not old:
            changed[name] = new
    return replace(value, **changed) if changed else value
