"""Everything that can be found wrong before a process group starts, all at once."""

import os
from collections.abc import Iterator
from itertools import count

from deepseek_train.config.check import check, of_fallback
from deepseek_train.config.fallbacks import variants
from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.train.batching import microbatches_for
from deepseek_train.train.data_plan import data_problems
from deepseek_train.train.device import planned_device, visible_gpus
from deepseek_train.train.expert_plan import expert_problems
from deepseek_train.train.fallbacks import fitting, resolve_layout
from deepseek_train.train.folder_plan import folder_problems, init_problems
from deepseek_train.train.kernel_plan import kernel_problems
from deepseek_train.train.schedule_plan import schedule_problems
from deepseek_train.train.stage_plan import pipeline_problems

_MOST_LOCAL_RANKS = 64  # more on one machine is a mistake: the big experiments want torchrun


def preflight(config: RunConfig, world_size: int | None) -> list[Problem]:
    """All problems of a run, each with its mend. Reads the configuration, the run folder and the data's manifest."""
    found = check(config)
    if found:  # most of the rest computes with these numbers
        certain = config.cluster.device == "cpu" or not visible_gpus()
        return [*found, *(kernel_problems(config, "cpu") if certain else [])]
    chosen = fitting(config, world_size)
    layout = resolve_layout(chosen, world_size)
    return [
        *_of_layout(chosen, layout, world_size),
        *_of_fallbacks(config),
        *kernel_problems(chosen, planned_device(config.cluster.device, layout)),
        *_again(config),
        *folder_problems(chosen),
        *init_problems(chosen),
        *data_problems(chosen, layout),
    ]


def _of_layout(config: RunConfig, layout: ParallelLayout, world_size: int | None) -> list[Problem]:
    return [
        *_layout(config, layout, world_size),
        *expert_problems(config, layout),
        *_pipeline(config, layout),
    ]


def _of_fallbacks(config: RunConfig) -> Iterator[Problem]:
    """Of the layouts that a later start may fall back on: better now than in the night after a loss."""
    for index, variant in enumerate(variants(config)[1:]):
        layout = resolve_layout(variant, None)
        problems = [*_of_layout(variant, layout, layout.world), *data_problems(variant, layout)]
        yield from of_fallback(index, problems)


def _again(config: RunConfig) -> list[Problem]:
    """What would go wrong when torchrun starts the ranks again."""
    if config.resume != "never" or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return []
    what = "never, under torchrun --max-restarts: every restart would begin anew"
    mend = "Move the old run folder aside by hand, or use another name=...; or write --max-restarts 0."
    return [Problem("resume", what, mend)]


def _layout(config: RunConfig, layout: ParallelLayout, world_size: int | None) -> list[Problem]:
    found = []
    if world_size is not None and world_size != layout.world:
        found.append(
            Problem(
                "parallel",
                f"{world_size} ranks were started, the layout needs pp {layout.pp} x dp {layout.dp} = {layout.world}",
                "Start that many (torchrun --nproc-per-node), change parallel.pp or parallel.dp, or add a layout for "
                "as many to parallel.fallbacks.",
            )
        )
    if world_size is None and layout.world > _MOST_LOCAL_RANKS:
        what = f"{layout.world} ranks (pp {layout.pp} x dp {layout.dp}) on this one machine"
        found.append(
            Problem("parallel", what, "Start them with torchrun on all nodes: launch/multi_node_torchrun.sh.")
        )
    if layout.sharers % layout.ep:
        of = " of two mirrored pipeline ranks" if layout.mirrored else ""
        found.append(
            Problem(
                "parallel.ep",
                f"expert-parallel size {layout.ep} does not divide the {layout.sharers} data-parallel ranks{of}",
                "EP groups are consecutive data-parallel ranks: choose a divisor.",
            )
        )
    return found


def _pipeline(config: RunConfig, layout: ParallelLayout) -> list[Problem]:
    """The schedule, where the layers go, and whether batches are large enough for it."""
    found = pipeline_problems(config, layout.pp)
    # A batch is measured against a schedule that can run: not before parallel.pp is right.
    return found if any(p.where == "parallel.pp" for p in found) else [*found, *_batch(config, layout)]


def _batch(config: RunConfig, layout: ParallelLayout) -> list[Problem]:
    schedule, size, segments = config.schedule, config.train.microbatch_size, config.optim.batch_size.segments
    needed = next(m for m in count(1) if not schedule_problems(schedule, layout.pp, m))
    given = [
        ("start", 0),
        *((f"segments[{i}].to", s.until) for i, s in enumerate(segments) if s.to is not None),
    ]
    found = []
    for key, tokens in given:
        if not microbatches_for(config, layout, tokens):
            what = (
                f"the batch at {tokens} tokens is too small for {schedule.name}: {layout.pp} pipeline ranks need "
                f"{needed} micro-batches of {size} sequences on each of {layout.dp} data-parallel ranks"
            )
            smaller = ", or a smaller train.microbatch_size" if size > 1 else ""
            mend = f"Write optim.batch_size.{key}={needed * layout.dp * size} or more{smaller}."
            found.append(Problem("optim.batch_size", what, mend))
    return found
