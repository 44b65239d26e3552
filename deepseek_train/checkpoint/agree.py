"""How ranks come to one verdict: what fails on any rank is raised on all of them, so nobody waits in vain.

Errors travel as text: an exception with its traceback cannot always be pickled, and a rank that fails to send
its failure is the hang this file exists to prevent. Without a process group (one process) these are plain
calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from deepseek_train.checkpoint.errors import CheckpointError, StorageFailed
from deepseek_train.config.storage import storage_failed

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Reason:
    text: str
    storage: bool  # a disk's failure, and nothing else


def own_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def together(work: Callable[[], T], merge: Callable[[list[T]], Sequence[R]]) -> R:
    """Run ``work`` on every rank, then ``merge`` on rank 0 with all results by rank, which returns what each
    rank gets. Collective. Where either fails, all ranks raise CheckpointError with all the reasons, StorageFailed
    where only disks have failed."""
    value, error = _tried(work)
    outcomes = _gather((value, _reason(error)))
    replies: list[tuple[Any, _Reason | None]] = []
    if own_rank() == 0:
        why = _verdict([reason for _, reason in outcomes])
        merged: Sequence[R | None] | None = None
        if why is None:
            merged, error = _tried(lambda: merge([result for result, _ in outcomes]))
            why = _reason(error)
        replies = [(reply, why) for reply in merged or [None] * len(outcomes)]
    reply: R
    reply, why = _scatter(replies)
    if why is not None:
        raise (StorageFailed if why.storage else CheckpointError)(why.text) from error
    return reply


def on_first(work: Callable[[], R]) -> R:
    """Run ``work`` on rank 0 alone; every rank gets its result. Collective."""
    return together(lambda: None, lambda ranks: [work()] * len(ranks))


def _tried(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _reason(error: Exception | None) -> _Reason | None:
    if error is None:
        return None
    text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    return _Reason(text, isinstance(error, StorageFailed) or storage_failed(error))


def _verdict(reasons: list[_Reason | None]) -> _Reason | None:
    """One text for all, where anybody has a reason; the same reason is said once."""
    ranks: dict[_Reason, list[str]] = {}
    for rank, reason in enumerate(reasons):
        if reason is not None:
            ranks.setdefault(reason, []).append(str(rank))
    if not ranks:
        return None
    text = "\n".join(f"{reason.text} [rank {', '.join(who)}]" for reason, who in ranks.items())
    return _Reason(text, all(reason.storage for reason in ranks))


def _gather(value: Any) -> list[Any]:
    """Everybody's value by rank, on rank 0."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if own_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def _scatter(values: list[Any]) -> Any:
    """Each rank's own of rank 0's values."""
    if not dist.is_initialized():
        return values[0]
    own: list[Any] = [None]
    dist.scatter_object_list(own, values or None, src=0)
    return own[0]
