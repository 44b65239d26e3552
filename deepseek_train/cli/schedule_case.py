"""A request of ``deepseek-schedule`` becomes the sizes and the times of one schedule."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from deepseek_train.cli.key_value import UsageError
from deepseek_train.cli.schedule_request import AUTO, ScheduleRequest, Times
from deepseek_train.schedule import auto, catalog
from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.measured import durations_from_json
from deepseek_train.schedule.simulate import Durations, Seconds


@dataclass(frozen=True)
class Case:
    """One schedule to make: its sizes fit, its times are those of its own stages."""

    name: str
    ranks: int
    microbatches: int
    stages_per_rank: int
    times: Durations

    @property
    def stages(self) -> int:
        return self.ranks * self.stages_per_rank


def with_measured(request: ScheduleRequest) -> ScheduleRequest:
    """``request`` with the times of the file it names, and its number of stages where it gives none. Raises
    UsageError where that is no file of times."""
    if request.measured is None:
        return request
    try:
        found = durations_from_json(Path(request.measured).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError([f"measured={request.measured}: {error}"]) from error
    counts = [len(seconds) for seconds in vars(found).values() if isinstance(seconds, tuple)]
    given = request.stages is not None or request.ranks is not None or request.file is not None
    stages = request.stages if given or not counts else counts[0]
    return replace(request, times=Times(**vars(found)), stages=stages)


def make_case(request: ScheduleRequest, name: str) -> Case | list[str]:
    """``name`` with the sizes of ``request``, or why that cannot be."""
    problems = []
    per_rank = 1 if name == AUTO else catalog.stages_per_rank_of(name, request.stages_per_rank or 2)
    if request.ranks is not None:
        ranks, shares = request.ranks, request.ranks
    else:
        shares = 8 if request.stages is None else request.stages
        ranks = shares // per_rank
        if shares % per_rank:
            below, above = ranks * per_rank, (ranks + 1) * per_rank
            nearest = f"stages={below} or stages={above}" if below else f"stages={above}"
            problems.append(f"stages={shares}: {name} puts {per_rank} stages on every rank; use {nearest}")
    microbatches = 20 if request.microbatches is None else request.microbatches
    if not problems and name != AUTO:
        of_ranks = catalog.problems(name, ranks, 4 * ranks, per_rank)  # whatever the micro-batches
        key = "stages" if request.ranks is None else "ranks"
        for problem in catalog.problems(name, ranks, microbatches, per_rank):
            mend = (
                f"; write {_nearest(name, key, ranks, microbatches, per_rank)}" if problem in of_ranks else ""
            )
            problems.append(problem + mend)
    problems += time_problems(request.times, shares)
    if problems:
        return problems
    pieces = per_rank if request.ranks is not None else 1
    return Case(name, ranks, microbatches, per_rank, durations(request.times, pieces))


def _nearest(name: str, key: str, ranks: int, microbatches: int, per_rank: int) -> str:
    """What ``key`` ("stages" or "ranks") may be instead: with these micro-batches, else with more of them."""

    def nearest(legal: Callable[[int], bool]) -> list[int]:
        below = next(([n] for n in range(ranks - 1, 0, -1) if legal(n)), [])
        return below + next(([n] for n in range(ranks + 1, 2 * ranks + 2) if legal(n)), [])

    found = nearest(lambda n: not catalog.problems(name, n, microbatches, per_rank))
    found = found or nearest(lambda n: not catalog.problems(name, n, 4 * n, per_rank))
    return " or ".join(f"{key}={n * per_rank if key == 'stages' else n}" for n in found)


def make(case: Case, max_activations: int | None = None) -> tuple[Schedule, Durations, float | None]:
    """The schedule, the times of its stages and the closed form of its bubble. ``max_activations`` limits a search."""
    if case.name == AUTO:
        return auto.best(case.ranks, case.microbatches, case.times, max_activations), case.times, None
    schedule = catalog.make_schedule(case.name, case.ranks, case.microbatches, case.stages_per_rank)
    formula = catalog.formula_bubble(case.name, case.stages, case.times, case.stages_per_rank)
    return schedule, case.times, formula


def durations(times: Times, pieces: int = 1) -> Durations:
    """``times`` of stages that are each cut into ``pieces`` equal ones."""

    def cut(seconds: Seconds) -> Seconds:
        if isinstance(seconds, tuple):
            return tuple(second / pieces for second in seconds for _ in range(pieces))
        return seconds / pieces

    forward, for_inputs, for_weights = map(cut, (times.forward, times.backward_input, times.backward_weight))
    overlapped = _sum(forward, for_inputs, for_weights) if times.overlapped is None else cut(times.overlapped)
    return Durations(forward, for_inputs, for_weights, overlapped, times.latency)


def time_problems(times: Times, count: int) -> list[str]:
    """Lists that do not have ``count`` entries."""
    return [
        f"times.{field.name} lists {len(value)} times for {count} stages: write {count}, or one number for all"
        for field in fields(times)
        if isinstance(value := getattr(times, field.name), tuple) and len(value) != count
    ]


def _sum(*parts: Seconds) -> Seconds:
    count = max((len(part) for part in parts if isinstance(part, tuple)), default=0)
    at: Callable[[Seconds, int], float] = lambda part, s: part[s] if isinstance(part, tuple) else part  # noqa: E731
    if not count:
        return sum(at(part, 0) for part in parts)
    return tuple(sum(at(part, stage) for part in parts) for stage in range(count))
