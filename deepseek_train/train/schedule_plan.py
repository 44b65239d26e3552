"""The schedule that a configuration's pipeline runs: one of the catalog, or one searched for what its stages take."""

from pathlib import Path

from deepseek_train.config.schema import RunConfig, ScheduleConfig
from deepseek_train.schedule import catalog
from deepseek_train.schedule.action import Placement, Schedule
from deepseek_train.schedule.auto import search
from deepseek_train.schedule.measured import durations_from_json
from deepseek_train.schedule.simulate import Durations
from deepseek_train.spec.stages import StageSpec, stage_times


def known_name(schedule: ScheduleConfig, pp: int) -> str:
    """The schedule of the catalog whose placement and legal sizes hold: for ``auto`` the one it is never
    slower than."""
    if schedule.name == "auto":
        return "1f1b" if pp % 2 else "dualpipe"
    return schedule.name


def schedule_problems(schedule: ScheduleConfig, pp: int, num_microbatches: int) -> list[str]:
    """Why ``pp`` ranks cannot run it, each with its mend; empty: they can."""
    return catalog.problems(known_name(schedule, pp), pp, num_microbatches, schedule.stages_per_rank)


def placement_for(schedule: ScheduleConfig, pp: int, num_microbatches: int) -> Placement:
    """Where every stage is. Raises ValueError where that cannot be."""
    return catalog.placement_of(known_name(schedule, pp), pp, num_microbatches, schedule.stages_per_rank)


def schedule_for(schedule: ScheduleConfig, pp: int, num_microbatches: int, durations: Durations) -> Schedule:
    """The steps of every rank; the same on all ranks that give the same ``durations`` (only ``auto`` looks at them)."""
    if schedule.name != "auto":
        return catalog.make_schedule(schedule.name, pp, num_microbatches, schedule.stages_per_rank)
    return search(placement_for(schedule, pp, num_microbatches), durations, schedule.max_activations)


def durations_for(config: RunConfig, stages: tuple[StageSpec, ...]) -> Durations:
    """What an earlier run measured, if the configuration names it, else what ``stages`` have to compute.

    Raises ValueError or OSError for a file that holds no such times, or those of another number of stages.
    """
    if config.schedule.durations is None:
        forward, inputs, weights = stage_times(config.model, stages, config.data.sequence_length)
        pairs = tuple(map(sum, zip(forward, inputs, weights, strict=True)))
        return Durations(forward, inputs, weights, pairs)
    found = durations_from_json(Path(config.schedule.durations).read_text(encoding="utf-8"))
    if isinstance(found.forward, tuple) and len(found.forward) != len(stages):
        raise ValueError(f"holds the times of {len(found.forward)} stages, this pipeline has {len(stages)}")
    return found
