"""Schedules by the name they have in the configuration."""

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_train.schedule import dualpipe, one_f_one_b
from deepseek_train.schedule.action import Placement, Schedule


@dataclass(frozen=True)
class _Entry:
    make: Callable[[int, int], Schedule]
    place: Callable[[int, int], Placement]
    problems: Callable[[int, int], list[str]]


_ENTRIES = {
    "dualpipe": _Entry(dualpipe.dualpipe, dualpipe.mirrored, dualpipe.problems),
    "1f1b": _Entry(one_f_one_b.one_f_one_b, one_f_one_b.straight, one_f_one_b.problems),
}


def make_schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """The training schedule ``name``. Raises ValueError with all ``problems`` and their mends."""
    return _entry(name).make(num_ranks, num_microbatches)


def placement_of(name: str, num_ranks: int, num_microbatches: int) -> Placement:
    """Where ``name`` runs each stage. For ``forward_only``, which asks less of M than the schedule itself:
    evaluation with DualPipe's placement needs an even M, not 2 P. Raises ValueError.
    """
    return _entry(name).place(num_ranks, num_microbatches)


def problems(name: str, num_ranks: int, num_microbatches: int) -> list[str]:
    """Why ``name`` cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    if name not in _ENTRIES:
        return [_unknown(name)]
    return _ENTRIES[name].problems(num_ranks, num_microbatches)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(_unknown(name))
    return _ENTRIES[name]


def _unknown(name: str) -> str:
    return f"no schedule is named {name!r}: use one of {', '.join(_ENTRIES)}"
