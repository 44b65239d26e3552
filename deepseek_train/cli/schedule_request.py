"""What ``deepseek-schedule`` can be asked."""

from dataclasses import dataclass

from deepseek_train.schedule.simulate import Seconds

ALL, AUTO = "all", "auto"
PRINTED = ("text", "json", "schedule")
WRITTEN = {"svg": ".svg", "png": ".png", "perfetto": ".json"}  # output: how the file's name ends


@dataclass(frozen=True)
class Times:
    """Of each kind of work on one micro-batch in one stage: for all stages, or a list with one for each."""

    forward: Seconds = 1.0
    backward_input: Seconds = 1.0
    backward_weight: Seconds = 1.0
    overlapped: Seconds | None = None  # of a pair; None: as long as its parts in a row
    latency: float = 0.0


@dataclass(frozen=True)
class ScheduleRequest:
    """Keys of ``deepseek-schedule``."""

    name: str | None = None  # dualpipe, unless file is given
    file: str | None = None
    stages: int | None = None
    ranks: int | None = None
    microbatches: int | None = None
    stages_per_rank: int | None = None
    max_activations: int | None = None
    times: Times = Times()
    measured: str | None = None  # a file of times instead
    output: str = "text"
    path: str | None = None


def schedule_name(request: ScheduleRequest) -> str:
    """What is asked for, in lower case."""
    return (request.name or "dualpipe").lower()
