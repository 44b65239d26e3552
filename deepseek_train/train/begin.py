"""Where a run begins: at its newest good checkpoint, with another's weights, or at the start."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from upath import UPath

from deepseek_train.checkpoint.agree import on_first, own_rank
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.finder import candidates
from deepseek_train.checkpoint.folders import layout_words, set_aside_in
from deepseek_train.checkpoint.manifest import read_manifest
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.store import newest_good, problem_of
from deepseek_train.train.build import Job
from deepseek_train.train.folder import saved_before
from deepseek_train.train.state import Progress, load_checkpoint, load_weights, other_data

log = logging.getLogger(__name__)


class NoGoodCheckpoint(CheckpointError):
    """There were checkpoints and none is whole, or none is seen: a new beginning must be asked for."""


@dataclass(frozen=True)
class Begun:
    progress: Progress
    wandb_id: str | None
    how: str  # for the user; empty: from the start
    other_data: str | None = None  # what is other about the data from now on (data.allow_change)


def begin(job: Job, root: Place) -> Begun:
    """Loads what there is to load (collective). Damaged checkpoints are named and set aside, the newest good one is
    taken.

    Raises:
        NoGoodCheckpoint: all are damaged, or gone, or there is none and resume=must.
        CheckpointError, DataError: it is of another model or of other data.
    """
    config = job.config
    path = newest_good(root)
    if path is not None:
        if config.resume == "never":  # the run folder's own were moved aside with it
            raise CheckpointError(
                f"{root} holds checkpoints, and resume=never begins a new run: give it another checkpoint.path"
            )
        progress, wandb_id = load_checkpoint(job, path)
        saved_by = on_first(partial(_saved_by, path))
        how = f"resumed from {path} after step {progress.step}, saved by {saved_by}"
        return Begun(progress, wandb_id, how, other_data(job, path))
    bad = on_first(lambda: [str(one) for one in set_aside_in(root)])
    before = on_first(lambda: saved_before(Path(config.run_dir)))
    if before and not bad and config.resume != "never":
        raise NoGoodCheckpoint(
            f"{before}, and {root} holds no checkpoint now: bring its disk back, or write checkpoint.path=... if they "
            "were moved. Were they deleted on purpose, start afresh with resume=never."
        )
    if config.resume == "must" or (bad and config.resume != "never"):
        found = f" ({', '.join(bad)} are damaged)" if bad else ""
        raise NoGoodCheckpoint(
            f"no checkpoint in {root} is whole{found}: mend one (why-bad.txt in each says what is wrong) and take .bad "
            f"off its name, remove them, or start afresh with resume=never."
        )
    if config.init_from is not None:
        path = _whole_at(UPath(config.init_from))
        load_weights(job, path)
        return Begun(Progress(), None, f"weights of {path}, a new optimizer")
    return Begun(Progress(), None, "")


def _saved_by(path: Place) -> str:
    return layout_words(read_manifest(path).facts)


def _whole_at(source: Place) -> Place:
    """The newest whole checkpoint of another run (collective); what is damaged there is its own affair."""
    reasons = []
    for path in on_first(lambda: [one.path for one in candidates(source)]):  # another run may be saving there
        reason = problem_of(path)
        if reason is None:
            return path
        reasons.append(reason)
        if own_rank() == 0:
            log.warning("passed over: %s", reason)
    raise CheckpointError("\n".join(reasons))
