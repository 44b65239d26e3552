"""The pipeline that a configuration asks for: its stages, and why it cannot be."""

from deepseek_train.config.parse import ConfigError, Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.schedule.catalog import problems as schedule_problems
from deepseek_train.schedule.catalog import stages_per_rank_of
from deepseek_train.spec.stages import StageSpec, most_stages, split_layers


def num_stages(config: RunConfig, pp: int) -> int:
    """Stages of one model copy on ``pp`` pipeline ranks."""
    return pp * stages_per_rank_of(config.schedule.name, config.schedule.stages_per_rank)


def plan_stages(config: RunConfig, pp: int) -> tuple[StageSpec, ...]:
    """Every stage of the pipeline. Raises ConfigError where ``parallel.layers`` does not fit."""
    length = config.data.sequence_length
    return split_layers(config.model, num_stages(config, pp), length, config.parallel.layers)


def pipeline_problems(config: RunConfig, pp: int) -> list[Problem]:
    """Why ``pp`` ranks cannot run the schedule, or hold the layers, each with the nearest numbers that can."""
    faults = _faults(config, pp)
    if faults:
        return [Problem("parallel.pp", fault, _nearest(config, pp)) for fault in faults]
    try:
        plan_stages(config, pp)
    except ConfigError as error:
        return error.problems
    return []


def _faults(config: RunConfig, pp: int) -> list[str]:
    schedule, stages = config.schedule, num_stages(config, pp)
    plenty = 4 * pp  # micro-batches: how many a step has is checked elsewhere
    faults = schedule_problems(schedule.name, pp, plenty, schedule.stages_per_rank)
    if stages > most_stages(config.model):
        faults.append(
            f"{config.model.num_layers} layers cannot fill the {stages} stages of {schedule.name} on {pp} ranks: "
            "all but the first and the last need one"
        )
    return faults


def _nearest(config: RunConfig, pp: int) -> str:
    most = most_stages(config.model) // num_stages(config, 1)
    below = next((n for n in range(min(pp - 1, most), 0, -1) if not _faults(config, n)), None)
    above = next((n for n in range(pp + 1, most + 1) if not _faults(config, n)), None)
    near = " or ".join(f"parallel.pp={n}" for n in (below, above) if n is not None)
    if not near:
        return f"No pp will do for {config.schedule.name}: use schedule=1f1b."
    return f"Nearest that will do: {near}. Or use schedule=1f1b, which takes any up to {most_stages(config.model)}."
