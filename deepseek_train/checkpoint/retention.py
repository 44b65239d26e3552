"""Which checkpoints stay. The newest always does, so there is never none."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek_train.checkpoint.errors import CheckpointUnreadable
from deepseek_train.checkpoint.folders import RETIRED, Found, committed, half_deleted
from deepseek_train.checkpoint.places import Place, remove_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Kept are the ``last`` newest, those whose step is a multiple of ``every`` (0: none for that), and the ``best``
    by their fact ``validation_loss``."""

    last: int = 1
    every: int = 0
    best: int = 0

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(
                f"keep is {self.last}: the checkpoint just saved is always kept; write 1 or more"
            )

    def to_go(self, found: Sequence[Found], latest: Place) -> list[Found]:
        """What is not kept of ``found``, newest first. ``latest`` counts as the newest, whatever its step: a run that
        was sent back must not lose what it just saved."""
        whole = [one for one in found if not one.superseded]
        newest = [one for one in whole if one.path == latest] + [one for one in whole if one.path != latest]
        kept = {one.path for one in newest[: self.last]}
        kept |= {one.path for one in whole if self.every and one.step % self.every == 0}
        judged = sorted((one for one in whole if _loss(one) < math.inf), key=_loss)
        kept |= {one.path for one in judged[: self.best]}
        return [one for one in found if one.path not in kept]


def to_go_of_whole(
    found: Sequence[Found], retention: Retention, damage: Callable[[Found], list[str]]
) -> tuple[list[Found], list[str]]:
    """What is not kept where only whole ones count, and the damage of those that would have been kept: they stay too.
    ``damage`` looks into all files of one, and is asked of each that is to be kept, once. Nothing goes where none is
    whole."""
    whole, seen, damaged = [*found], set[Place](), list[str]()
    while whole:
        going = retention.to_go(whole, whole[0].path)
        unseen = next((one for one in whole if one not in going and one.path not in seen), None)
        if unseen is None:
            return going, damaged
        seen.add(unseen.path)
        if said := damage(unseen):
            damaged += said
            rest = [one for one in whole if one is not unseen]
            earlier = [{other.step for other in rest[:at]} for at in range(len(rest))]
            whole = [
                replace(one, superseded=one.step in steps) for one, steps in zip(rest, earlier, strict=True)
            ]
    return [], damaged


def retire(root: Place, latest: Place, retention: Retention) -> None:
    """Delete what is not kept. What cannot be deleted stays, with a warning: a full checkpoint more is no reason to
    stop a run. One thread at a time."""
    for leftover in half_deleted(root):
        try:
            remove_folder(leftover)
        except OSError as error:
            log.warning("old checkpoint %s could not be deleted: %s", leftover, error)
    try:
        going = retention.to_go(committed(root), latest)
    except CheckpointUnreadable as error:
        log.warning("old checkpoints stay until the next save: %s", error)
        return
    for one in going:
        try:
            discard(one.path)
        except OSError as error:
            log.warning("old checkpoint %s could not be deleted: %s", one.path, error)


def discard(path: Place) -> None:
    """Deletes a checkpoint; killed meanwhile, it leaves a draft at most. Raises OSError."""
    if isinstance(path, Path):  # renamed first: half a checkpoint must not look like one
        path = path.rename(path.with_name(f"{path.stem}.{RETIRED}{path.suffix}"))
    remove_folder(path)


def _loss(found: Found) -> float:
    loss = found.facts.get("validation_loss")
    return float(loss) if isinstance(loss, int | float) and not math.isnan(loss) else math.inf
