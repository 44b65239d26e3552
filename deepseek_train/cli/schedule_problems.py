"""What can be wrong with a request of ``deepseek-schedule``: all of it at once, each with its mend."""

import math
from dataclasses import fields

from deepseek_train.cli.schedule_case import make_case
from deepseek_train.cli.schedule_request import (
    ALL,
    AUTO,
    PRINTED,
    WRITTEN,
    ScheduleRequest,
    Times,
    schedule_name,
)
from deepseek_train.schedule import catalog
from deepseek_train.schedule.simulate import Seconds

_SIZES = ("name", "stages", "ranks", "microbatches", "stages_per_rank", "max_activations")


def request_problems(request: ScheduleRequest) -> list[str]:
    """Everything that is wrong with a request in itself; what only a file can show comes later."""
    problems = [
        f"{key}={value}: not a positive number"
        for key in ("stages", "ranks", "microbatches", "stages_per_rank", "max_activations")
        if (value := getattr(request, key)) is not None and value < 1
    ]
    sizes_are_positive = not problems
    values = [getattr(request.times, field.name) for field in fields(Times)]
    for field, value in zip(fields(Times), values, strict=True):
        wrong = [v for v in _entries(value) if not (math.isfinite(v) and v >= 0)]
        problems += [f"times.{field.name}={v:g}: not a time; write 0 or more" for v in wrong[:1]]
    if not any(v > 0 for value in values[:3] for v in _entries(value)):
        problems.append("all times are 0: there is nothing to draw; give times.forward or others more than 0")
    if request.measured is not None and request.times != Times():
        problems.append("measured and times.* are both given: write one of them")
    outputs = [*PRINTED, *WRITTEN]
    if request.output not in outputs:
        problems.append(f"output={request.output}: write one of {' '.join(outputs)}")
    if request.path is not None and request.output in PRINTED:
        problems.append(f"output={request.output} is printed: leave path away, or write '> {request.path}'")
    suffix = WRITTEN.get(request.output, "")
    if request.path is not None and not request.path.endswith(suffix):
        problems.append(f"path={request.path}: output={request.output} is a file that ends in {suffix}")
    if request.file is not None:
        given = [k for k in _SIZES if getattr(request, k) is not None and k != "max_activations"]
        if request.max_activations is not None:
            problems.append(
                f"max_activations is a limit for name=auto alone, not for the file {request.file}"
            )
        problems += [f"{key} is in the file {request.file} already: leave {key}=.. away" for key in given]
        return problems
    return problems + _name_problems(request, sizes_are_positive)


def _name_problems(request: ScheduleRequest, sizes_are_positive: bool) -> list[str]:
    problems = []
    name = schedule_name(request)
    if request.stages is not None and request.ranks is not None:
        problems.append("stages and ranks are both given: write one, the other follows from the schedule")
    if request.max_activations is not None and name != AUTO:
        problems.append(f"max_activations is a limit for name=auto alone: {name} needs what it needs")
    if name == ALL:
        if request.output not in ("text", "json"):
            problems.append(f"output={request.output} shows one schedule: with name=all write text or json")
        return problems
    if name != AUTO:
        try:
            per_rank = catalog.stages_per_rank_of(name, request.stages_per_rank or 2)
        except ValueError as error:
            return [*problems, f"{error}; or all (a table of them), or auto (a search)"]
        if request.stages_per_rank not in (None, per_rank):
            what = f"{name} has {per_rank} on every rank; leave it away, or take interleaved_1f1b"
            problems.append(f"stages_per_rank={request.stages_per_rank}: {what}")
    made = make_case(request, name) if sizes_are_positive and request.measured is None else []
    return problems + (made if isinstance(made, list) else [])


def _entries(value: Seconds | None) -> tuple[float, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)
