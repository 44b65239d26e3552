"""What there is to know of a simulated schedule, in numbers."""

from dataclasses import dataclass

from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.simulate import Durations, peak_activations, peak_weight_queue
from deepseek_train.schedule.timeline import Timeline


@dataclass(frozen=True)
class Facts:
    """One row of the comparison; ``dataclasses.asdict`` of it is the JSON of ``deepseek-schedule``. Times have the unit
    of ``times``; tuples hold a value for each rank."""

    name: str
    stages: int  # of one copy of the model
    ranks: int
    microbatches: int
    times: Durations  # of one stage each
    makespan: float
    bubble: tuple[float, ...]  # makespan minus busy
    bubble_fraction: float
    peak_activations: tuple[int, ...]  # live (stage, micro-batch) forwards
    peak_weight_queue: tuple[int, ...]
    formula_bubble: float | None  # closed form; None: none is known for these times


def facts_of(schedule: Schedule, timeline: Timeline, times: Durations, formula: float | None = None) -> Facts:
    """``timeline`` is ``simulate(schedule, times)``."""
    makespan = timeline.makespan()
    return Facts(
        name=schedule.name,
        stages=schedule.placement.num_stages,
        ranks=timeline.num_ranks,
        microbatches=schedule.placement.num_microbatches,
        times=times,
        makespan=makespan,
        bubble=tuple(makespan - timeline.busy(rank) for rank in range(timeline.num_ranks)),
        bubble_fraction=timeline.bubble_fraction(),
        peak_activations=peak_activations(schedule),
        peak_weight_queue=peak_weight_queue(schedule),
        formula_bubble=formula,
    )
