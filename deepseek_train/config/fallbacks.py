"""The layouts a run may have: what was asked for, and what to do with fewer machines or more."""

from dataclasses import replace

from deepseek_train.config.schema import FallbackConfig, RunConfig


def variants(run: RunConfig) -> tuple[RunConfig, ...]:
    """``run`` itself, then as each of ``parallel.fallbacks`` has it, in their order."""
    return (run, *(_with(run, fallback) for fallback in run.parallel.fallbacks))


def _with(run: RunConfig, layout: FallbackConfig) -> RunConfig:
    parallel = replace(
        run.parallel,
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        ep_across_mirrors=layout.ep_across_mirrors,
        layers=layout.layers,
    )
    schedule = replace(run.schedule, name=layout.schedule or run.schedule.name)
    return replace(run, parallel=parallel, schedule=schedule)
