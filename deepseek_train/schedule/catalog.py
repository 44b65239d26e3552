"""Schedules by the name they have in the configuration, "DualPipeV" as well as "dualpipe_v"."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from deepseek_train.schedule import (
    closed_forms,
    dualpipe,
    dualpipe_v,
    gpipe,
    interleaved,
    one_f_one_b,
    zb_h1,
    zb_v,
)
from deepseek_train.schedule.action import Placement, Schedule
from deepseek_train.schedule.placements import folded, looped, straight
from deepseek_train.schedule.simulate import Durations


@dataclass(frozen=True)
class _Entry:
    """Functions of (ranks, micro-batches) and, if ``chooses_stages``, of the stages a rank."""

    make: Callable[..., Schedule]
    place: Callable[..., Placement]
    problems: Callable[..., list[str]]
    stages_per_rank: int = 1
    chooses_stages: bool = False

    def sizes(self, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> tuple[int, ...]:
        given = (num_ranks, num_microbatches, stages_per_rank)
        return given if self.chooses_stages else given[:2]


_ENTRIES = {
    "gpipe": _Entry(gpipe.gpipe, straight, gpipe.problems),
    "1f1b": _Entry(one_f_one_b.one_f_one_b, straight, one_f_one_b.problems),
    "interleaved_1f1b": _Entry(interleaved.interleaved, looped, interleaved.problems, chooses_stages=True),
    "zb_h1": _Entry(zb_h1.zb_h1, straight, zb_h1.problems),
    "zb_v": _Entry(zb_v.zb_v, folded, zb_v.problems, stages_per_rank=2),
    "dualpipe": _Entry(dualpipe.dualpipe, dualpipe.mirrored, dualpipe.problems),
    "dualpipe_v": _Entry(dualpipe_v.dualpipe_v, folded, dualpipe_v.problems, stages_per_rank=2),
}
NAMES: tuple[str, ...] = tuple(_ENTRIES)

_ALIASES = {"zb1p": "zb_h1", "interleaved": "interleaved_1f1b"}


def make_schedule(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """The training schedule ``name``. ``stages_per_rank`` is for interleaved_1f1b, the others have their own. Raises
    ValueError with all ``problems`` and their mends.
    """
    entry = _entry(name)
    return entry.make(*entry.sizes(num_ranks, num_microbatches, stages_per_rank))


def placement_of(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Placement:
    """Where ``name`` runs each stage. For ``forward_only``, which asks less of M than the schedule itself:
    evaluation with DualPipe's placement needs an even M, not 2 P. Raises ValueError.
    """
    entry = _entry(name)
    return entry.place(*entry.sizes(num_ranks, num_microbatches, stages_per_rank))


def problems(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> list[str]:
    """Why ``name`` cannot run P ranks and M micro-batches, each with its mend; empty: it can."""
    try:
        entry = _entry(name)
    except ValueError as unknown:
        return [str(unknown)]
    return entry.problems(*entry.sizes(num_ranks, num_microbatches, stages_per_rank))


def stages_per_rank_of(name: str, stages_per_rank: int = 2) -> int:
    """Stages of one model copy for each rank; ranks times this is the number of stages. A rank of DualPipe, which
    holds two, holds them of two copies: 1. Raises ValueError for an unknown name.
    """
    entry = _entry(name)
    return stages_per_rank if entry.chooses_stages else entry.stages_per_rank


def formula_bubble(
    name: str, num_stages: int, durations: Durations, stages_per_rank: int = 2
) -> float | None:
    """Idle seconds of each rank by the closed form published for ``name``, None where none is known
    (``schedule/closed_forms.py``). Raises ValueError for an unknown name.
    """
    return closed_forms.idle_seconds(canonical(name), num_stages, durations, stages_per_rank)


def canonical(name: str) -> str:
    """The name among ``NAMES`` that ``name`` means, whatever its case, hyphens and underscores. Raises ValueError
    with the nearest one.
    """
    known = {_bare(each): each for each in NAMES} | _ALIASES
    if _bare(name) not in known:
        nearest = known[get_close_matches(_bare(name), known, n=1, cutoff=0.0)[0]]
        raise ValueError(
            f"no schedule is named {name!r}: did you mean {nearest}? There are {', '.join(NAMES)}"
        )
    return known[_bare(name)]


def _bare(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _entry(name: str) -> _Entry:
    return _ENTRIES[canonical(name)]
