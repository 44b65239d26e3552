"""Tensors inside the frozen dataclasses that flow between phases."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def differentiable(value: Any) -> list[Tensor]:
    """The tensors in ``value`` that require a gradient, in field order. Looks into dataclasses and tuples."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, tuple):
        return [t for item in value for t in differentiable(item)]
    if is_dataclass(value):
        return [t for one in fields(value) for t in differentiable(getattr(value, one.name))]
    return []


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """``value`` with its differentiable tensors, in the order of ``differentiable``, taken from ``tensors``."""
    if isinstance(value, Tensor):
        return next(tensors) if value.requires_grad else value
    if isinstance(value, tuple):
        return tuple(with_tensors(item, tensors) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for one in fields(value):
            old = getattr(value, one.name)
            new = with_tensors(old, tensors)
            if new is not old:
                changed[one.name] = new
        return replace(value, **changed) if changed else value
    return value
