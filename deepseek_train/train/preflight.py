"""Everything that can be found wrong before a process group starts, all at once."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import count
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from upath import UPath

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.finder import CONFIG_FILE, candidates
from deepseek_train.checkpoint.folders import newest
from deepseek_train.checkpoint.hf_config import CONFIG as HF_CONFIG
from deepseek_train.checkpoint.places import is_there
from deepseek_train.config.check import check, of_fallback
from deepseek_train.config.fallbacks import variants
from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.config.storage import storage_failed
from deepseek_train.data.errors import DataError
from deepseek_train.data.loader import TokenSource
from deepseek_train.data.manifest import MANIFEST_FILE
from deepseek_train.data.prepare import check_prepared
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.train.batching import eval_microbatches, microbatches_for
from deepseek_train.train.device import planned_device
from deepseek_train.train.expert_plan import expert_problems
from deepseek_train.train.fallbacks import fitting, resolve_layout
from deepseek_train.train.folder import as_json, checkpoints_of, config_yaml, read_config
from deepseek_train.train.kernel_plan import kernel_problems
from deepseek_train.train.schedule_plan import schedule_problems
from deepseek_train.train.stage_plan import pipeline_problems

# Any layout and any schedule read any checkpoint; a model is its own shape, and its data in their order.
_FIXED_ON_RESUME = ("model", "precision", "seed", "data")
_MOST_LOCAL_RANKS = 64  # more on one machine is a mistake: the big experiments want torchrun


def preflight(config: RunConfig, world_size: int | None) -> list[Problem]:
    """All problems of a run, each with its mend. Reads the configuration, the run folder and the data's manifest."""
    found = check(config)
    if found:
        return found  # the rest computes with these numbers
    chosen = fitting(config, world_size)
    layout = resolve_layout(chosen, world_size)
    return [
        *_of_layout(chosen, layout, world_size),
        *_of_fallbacks(config),
        *kernel_problems(chosen, planned_device(config.cluster.device, layout)),
        *_again(config),
        *_folder(chosen),
        *_init_from(chosen),
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


def _nearest(folder: Path) -> Path:
    """``folder``, or what there is already of the way to it."""
    return folder if folder.exists() else _nearest(folder.parent)


def _folder(config: RunConfig) -> list[Problem]:
    folder = Path(config.run_dir)
    # The run's lock lies beside its folder.
    written = {_nearest(one): "run_dir" for one in (folder, folder.absolute().parent)}
    try:
        checkpoints = checkpoints_of(config, folder)
        there = is_there(checkpoints)
        if config.checkpoint.path and isinstance(checkpoints, Path):
            written[_nearest(checkpoints)] = "checkpoint.path"
    except (ImportError, ValueError, OSError) as error:
        mend = "Name a folder, or a URL that fsspec and its packages here know; null: the run folder's own."
        what = f"{config.checkpoint.path} cannot be looked at: {error}"
        return [Problem("checkpoint.path", what, mend, storage_failed(error))]
    for needed, key in written.items():
        try:
            with tempfile.TemporaryFile(dir=needed):
                pass
        except OSError as error:
            what = f"cannot write to {needed}: {error.strerror}"
            return [Problem(key, what, f"Choose a folder that is yours: {key}=...", storage_failed(error))]
    if config.resume == "never":
        return []
    if not there or not (folder / CONFIG_FILE).is_file():
        if config.resume == "must":
            return [
                Problem("resume", f"{folder} holds no checkpoint", "Use resume=auto, or another run_dir.")
            ]
        return []
    try:
        before = read_config(folder)
    except (ValueError, OSError) as error:
        mend = (
            f"Delete {folder / CONFIG_FILE} to go on as this command says, or start afresh with resume=never."
        )
        return [Problem("run_dir", str(error), mend, storage_failed(error))]
    now: dict[str, Any] = yaml.safe_load(config_yaml(config))
    for group, kind in get_type_hints(RunConfig).items():
        if is_dataclass(kind) and isinstance(
            before.get(group), dict
        ):  # fields that the older run did not know
            unset = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
            before[group] = unset | before[group]
    for groups in (before, now):  # data may have moved; that they are the same is checked by their hash
        for name in ("path", "allow_change", *(["source"] if config.data.source is None else [])):
            groups["data"].pop(name, None)
    fixed = [group for group in _FIXED_ON_RESUME if group != "data" or not config.data.allow_change]
    changed = [group for group in fixed if before.get(group) != now[group]]
    return [
        Problem(
            group,
            f"differs from the run in {folder} ({_difference(before.get(group), now[group])})",
            "Set it back to go on with that run, use another name=..., or start afresh with resume=never"
            + (", or go on with other data by data.allow_change=true." if group == "data" else "."),
        )
        for group in changed
    ]


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        return ", ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in keys[:4])
    return f"was {before}, is {now}"


def _init_from(config: RunConfig) -> list[Problem]:
    """Whether the weights that a new run is to begin with are there, and of its model. A run that has a checkpoint of
    its own begins with that one."""
    if config.init_from is None:
        return []
    mend = "Name a checkpoint, or a run or a folder of deepseek-convert that has one."
    try:
        if config.resume != "never" and newest(checkpoints_of(config, Path(config.run_dir))) is not None:
            return []
        if is_there(UPath(config.init_from) / HF_CONFIG):
            what = f"{config.init_from} is a folder in Hugging Face's layout"
            convert = (
                f"deepseek-convert from_hf source={config.init_from} target=FOLDER, and init_from=FOLDER."
            )
            return [Problem("init_from", what, convert)]
        newest_there = candidates(UPath(config.init_from))[0]
    except (CheckpointError, ImportError, ValueError, OSError) as error:
        return [Problem("init_from", str(error), mend, storage_failed(error))]
    ours, path, theirs = as_json(config.model), newest_there.path, newest_there.facts.get("model")
    if not isinstance(theirs, dict):
        return [Problem("init_from", f"{path} does not say of which model it is", mend)]
    shape = ours.keys() - {
        "name",
        "init_std",
        "embed_init_std",
        "rope_theta",
        "yarn",
    }  # which may be others now
    pairs = {key: theirs.get(key) for key in shape}, {key: ours[key] for key in shape}
    if pairs[0] == pairs[1]:
        return []
    what = f"the model of {path} is another one ({_difference(*pairs)})"
    return [Problem("init_from", what, "Use the same sizes: model=..., or its config.yaml's.")]


def data_problems(config: RunConfig, layout: ParallelLayout) -> list[Problem]:
    """Problems of prepared data. Missing data is none here: the command prepares it, or says how."""
    if not (Path(config.data.path) / MANIFEST_FILE).exists():
        return []
    try:
        check_prepared(config.data)
        open_source(config, "train")
        held_out = open_source(config, "validation").num_sequences
    except DataError as error:
        return [Problem(f"data ({error.where})", error.what, error.mend, storage_failed(error))]
    wanted = eval_microbatches(config) * layout.dp * config.train.microbatch_size
    if wanted > held_out:
        what = f"an evaluation takes {wanted} sequences of {config.data.sequence_length} tokens, {held_out} exist"
        most = held_out // (layout.dp * config.train.microbatch_size) // 2 * 2
        mend = f"Use at most {most}" if most else "Lower data.sequence_length"
        return [Problem("train.eval_microbatches", what, f"{mend}, or prepare more text for validation.")]
    return []


def open_source(config: RunConfig, split: Any) -> TokenSource:
    """One split of the run's data, with the lookahead its MTP modules need."""
    m = config.model
    return TokenSource(
        config.data.path, split, config.data.sequence_length, m.mtp_depth, config.seed, m.vocab_size
    )
