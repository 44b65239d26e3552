"""Saving behind the run: a step waits only for a copy of its state; the files are written by a thread meanwhile.

All that ranks agree on happens in ``begin`` and ``finish``, which all ranks call at the same steps. Whatever touches
the disk is the thread's: this rank's file, and rank 0's drafts, commits and deletions, one after the other; so every
wait for a disk that hangs is bounded. At most one save is under way.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepseek_train.checkpoint import index
from deepseek_train.checkpoint.agree import own_rank, together
from deepseek_train.checkpoint.behind import Behind
from deepseek_train.checkpoint.errors import CheckpointError, StorageFailed
from deepseek_train.checkpoint.folders import commit, new_draft, sweep
from deepseek_train.checkpoint.manifest import FileRecord, Manifest, record_of
from deepseek_train.checkpoint.pieces import Snapshot, Summary, check_agreement
from deepseek_train.checkpoint.places import Place, free_bytes, remove_folder, write_synced
from deepseek_train.checkpoint.plan import Offer, SavePlan, file_of, offer_of, plan_save
from deepseek_train.checkpoint.retention import Retention, retire
from deepseek_train.checkpoint.tensor_file import FileLayout, Part, layout_of, write_tensor_file
from deepseek_train.watch.say import say
from deepseek_train.watch.whereabouts import Whereabouts

PATIENCE_SECONDS = 480.0  # for each piece of the thread's work; less than other ranks wait in a collective
LEAVING_SECONDS = 60.0  # for deletions, when a run ends

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Running:
    step: int
    snapshot: Snapshot
    draft: Place
    written: Future[FileRecord]


class Saver:
    """Saves all ranks' snapshots in ``root``, a folder that all ranks see. Every method is collective, but for
    ``writing`` and ``close``.

    Host memory: once the size of this rank's state, kept from one save to the next, pinned where the state is on a GPU.
    """

    def __init__(
        self,
        root: Place,
        retention: Retention,
        where: Whereabouts | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """``where`` is told what this rank is at."""
        self._root, self._retention = root, retention
        self._where, self._patience = where or Whereabouts.unseen(), patience_seconds
        self._thread = Behind(f"rank {own_rank()}")
        self._late: Future[Any] | None = None  # what was given up waiting for
        self._layout = FileLayout((), b"", (), 0)
        self._plan: SavePlan | None = None  # rank 0's, for the offers of these digests
        self._planned: list[str] = []
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._running: _Running | None = None
        self._deleting: Future[None] | None = None  # rank 0's: the last of them

    @property
    def running(self) -> int | None:
        """The step of the save under way; the same on all ranks."""
        return None if self._running is None else self._running.step

    @property
    def writing(self) -> bool:
        """Whether this rank's file is not there yet."""
        return self._running is not None and not self._running.written.done()

    def begin(self, step: int, snapshot: Snapshot) -> None:
        """Copies the state and starts to write it as the checkpoint of ``step``.

        Raises CheckpointError on every rank when it fails on any: pieces that overlap or leave gaps, replicated tensors
        or facts that differ between ranks, a disk that is full, silent or not writable. Older checkpoints are as before
        then. As long as a disk has not come back that was waited for in vain, it fails at once.
        """
        assert self._running is None, "one save at a time: finish the one before"
        draft = self._agree(step, snapshot)
        written: Future[FileRecord] = Future()
        try:
            tensors = self._copy(snapshot)
        except (MemoryError, RuntimeError) as error:  # no host memory: told to all by ``finish``
            written.set_exception(error)
        else:
            path = draft / file_of(own_rank())
            written = self._thread.submit(
                f"writing {path}", partial(write_tensor_file, path, self._layout, tensors)
            )
        self._running = _Running(step, snapshot, draft, written)

    def finish(self) -> Place:
        """Waits for all ranks' files and makes them a checkpoint; returns its folder. Raises as ``begin`` does."""
        running, self._running = self._running, None
        assert running is not None, "nothing was begun"

        def new(files: list[FileRecord]) -> Place:
            return self._done(
                f"manifest and rename of {running.draft}", partial(self._commit, running, files)
            )

        try:
            files = self._together("checkpoint's files", lambda: self._file(running), _to_rank_0)
            final = self._together("checkpoint's commit", _nothing, lambda all: [new(files)] * len(all))
        except CheckpointError:
            self._delete(f"deleting {running.draft}", partial(_remove, running.draft))
            raise
        going = partial(retire, self._root, final, self._retention)
        self._delete(f"deleting old checkpoints in {self._root}", going)
        return final

    def settle(self) -> None:
        """Waits for deletions: rank 0 may look for checkpoints then, and meets none half deleted. Raises
        StorageFailed on every rank where they do not end."""

        def deleted() -> None:
            if self._deleting is not None:
                self._wait("deletions", self._deleting)

        self._together("deletions", deleted, lambda nothings: nothings)

    def close(self) -> None:
        """The end: waits for deletions, a while. Not collective; a save under way is given up."""
        if self._deleting is not None and not self._thread.wait(self._deleting, LEAVING_SECONDS):
            say(f"rank {own_rank()} leaves without waiting for the disk any longer: {self._thread.doing}")
        self._thread.end()

    def _file(self, running: _Running) -> FileRecord:
        """This rank's, once it is written."""
        path = running.draft / file_of(own_rank())
        self._where.at(f"until {path.parent.name}/{path.name} is written")
        return self._wait(f"writing {path}", running.written)

    def _commit(self, running: _Running, files: list[FileRecord]) -> Place:
        assert self._plan is not None
        content = index.encode(self._plan.tensors)
        write_synced(running.draft / index.NAME, content)
        records = {file_of(rank): record for rank, record in enumerate(files)}
        manifest = Manifest(running.step, running.snapshot.facts, records | {index.NAME: record_of(content)})
        return commit(running.draft, manifest)

    def _delete(self, what: str, work: Callable[[], None]) -> None:
        """On rank 0, behind the run."""
        if own_rank() == 0:
            self._deleting = self._thread.submit(what, work)

    def _done(self, what: str, work: Callable[[], T]) -> T:
        """The result of ``work``, which the thread does now."""
        self._where.at(what)
        return self._wait(what, self._thread.submit(what, work))

    def _wait(self, what: str, work: Future[T]) -> T:
        if not self._thread.wait(work, self._patience):
            self._late = work
            at = self._thread.doing
            raise StorageFailed(f"{what} is not done after {self._patience:.0f} s: see to the disk ({at})")
        return work.result()

    def _raise_if_late(self) -> None:
        if self._late is not None and not self._late.done():
            raise StorageFailed(f"an earlier save still holds up the disk: {self._thread.doing}")
        self._late = None

    def _together(self, what: str, work: Callable[[], T], merge: Callable[[list[T]], Sequence[R]]) -> R:
        """As ``agree.together``; whoever looks sees which rank works and which ones wait for it."""

        def own() -> T:
            self._where.at(what)
            try:
                return work()
            finally:
                self._where.waits(f"{what}: the verdict of all ranks")

        def of_all(found: list[T]) -> Sequence[R]:
            self._where.goes_on()
            return merge(found)

        try:
            return together(own, of_all)
        finally:
            self._where.goes_on()

    def _agree(self, step: int, snapshot: Snapshot) -> Place:
        """The draft, after all have agreed on what goes into it."""
        offer: list[Offer] = []

        def summary() -> tuple[Summary, str]:
            self._raise_if_late()
            offer.append(offer_of(snapshot))
            return snapshot.summary(step), offer[0].digest()

        def new_plan(found: list[tuple[Summary, str]]) -> list[bool]:
            check_agreement([summary for summary, _ in found])
            return [self._planned != [digest for _, digest in found]] * len(found)

        if self._together("checkpoint's content", summary, new_plan):
            self._layout = layout_of(self._together("checkpoint's plan", lambda: offer[0], self._make_plan))
        new = partial(self._done, f"a draft in {self._root}", partial(self._draft, step))
        return self._together("checkpoint's draft", _nothing, lambda all: [new()] * len(all))

    def _make_plan(self, offers: list[Offer]) -> list[tuple[Part, ...]]:
        self._plan, self._planned = plan_save(offers), [offer.digest() for offer in offers]
        return list(self._plan.parts)

    def _draft(self, step: int) -> Place:
        assert self._plan is not None
        sweep(self._root, step)
        draft = new_draft(self._root, step)
        free = free_bytes(draft)
        if free is not None and free < self._plan.bytes:
            _remove(draft)
            needed, gib = self._plan.bytes, 2**30
            raise StorageFailed(
                f"a checkpoint takes {needed / gib:.2f} GiB, {self._root} has {free / gib:.2f} GiB left: make room, or "
                "keep fewer (checkpoint.keep)"
            )
        return draft

    def _copy(self, snapshot: Snapshot) -> list[Tensor]:
        """The parts of this rank's file, as they are now, in host memory."""
        table = {
            (name, piece.start): piece.tensor for name, held in snapshot.flat().items() for piece in held
        }
        copies, on_gpu = [], False
        for part in self._layout.parts:
            source = table[part.name, part.start].detach()
            home = self._copies.get((part.name, part.start))
            if home is None:
                home = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
                self._copies[part.name, part.start] = home
            home.copy_(source, non_blocking=True)
            on_gpu |= source.is_cuda
            copies.append(home)
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def _nothing() -> None:
    """What ranks do for a piece of rank 0's work."""


def _to_rank_0(files: list[FileRecord]) -> list[list[FileRecord]]:
    return [files, *([] for _ in files[1:])]


def _remove(draft: Place) -> None:
    try:
        remove_folder(draft)
    except OSError:  # what stays goes with the next save
        return
