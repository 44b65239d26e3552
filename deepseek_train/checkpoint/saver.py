"""Saving behind the run: a step waits only for a copy of its state; the files are written by a thread meanwhile.

All that ranks agree on happens in ``begin`` and ``finish``, which all ranks call at the same steps; the thread computes
checksums and writes this rank's own file, nothing else. At most one save is under way.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_train.checkpoint import index
from deepseek_train.checkpoint.agree import on_first, own_rank, together
from deepseek_train.checkpoint.errors import CheckpointError, StorageFailed
from deepseek_train.checkpoint.folders import commit, new_draft, sweep
from deepseek_train.checkpoint.manifest import FileRecord, Manifest, record_of
from deepseek_train.checkpoint.pieces import Snapshot, Summary, check_agreement
from deepseek_train.checkpoint.places import Place, free_bytes, remove_folder, write_synced
from deepseek_train.checkpoint.plan import Offer, SavePlan, file_of, offer_of, plan_save
from deepseek_train.checkpoint.retention import Retention, retire
from deepseek_train.checkpoint.tensor_file import FileLayout, Part, layout_of, write_tensor_file


@dataclass(frozen=True)
class _Running:
    step: int
    snapshot: Snapshot
    draft: Place
    written: Future[FileRecord]


class Saver:
    """Saves all ranks' snapshots in ``root``, a folder that all ranks see. Every method is collective, but for
    ``writing``, ``settle`` and ``close``.

    Host memory: once the size of this rank's state, kept from one save to the next, pinned where the state is on a GPU.
    """

    def __init__(self, root: Place, retention: Retention) -> None:
        self._root, self._retention = root, retention
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._layout = FileLayout((), b"", (), 0)
        self._plan: SavePlan | None = None  # rank 0's, for the offers of these digests
        self._planned: list[str] = []
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._running: _Running | None = None
        self._retiring: Future[None] | None = None  # rank 0's

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
        or facts that differ between ranks, a disk that is full or not writable. Older checkpoints are as before then.
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
            written = self._thread.submit(write_tensor_file, path, self._layout, tensors)
        self._running = _Running(step, snapshot, draft, written)

    def finish(self) -> Place:
        """Waits for all ranks' files and makes them a checkpoint; returns its folder. Raises as ``begin`` does."""
        running, self._running = self._running, None
        assert running is not None, "nothing was begun"

        def close(files: list[FileRecord]) -> list[Place]:
            assert self._plan is not None
            content = index.encode(self._plan.tensors)
            write_synced(running.draft / index.NAME, content)
            records = {file_of(rank): record for rank, record in enumerate(files)}
            manifest = Manifest(
                running.step, running.snapshot.facts, records | {index.NAME: record_of(content)}
            )
            return [commit(running.draft, manifest)] * len(files)

        try:
            final = together(running.written.result, close)
        except CheckpointError:  # on all ranks: nobody writes any more
            if own_rank() == 0:
                _remove(running.draft)
            raise
        if own_rank() == 0:
            self._retiring = self._thread.submit(retire, self._root, final, self._retention)
        return final

    def settle(self) -> None:
        """Waits for deletions (not collective): rank 0 may look for checkpoints then, and meets none half deleted."""
        if self._retiring is not None:
            self._retiring.result()
            self._retiring = None

    def close(self) -> None:
        """Waits for deletions. Not collective; a save under way is given up."""
        self._thread.shutdown(wait=True)

    def _agree(self, step: int, snapshot: Snapshot) -> Place:
        """The draft, after all have agreed on what goes into it."""
        offer: list[Offer] = []

        def summary() -> tuple[Summary, str]:
            offer.append(offer_of(snapshot))
            return snapshot.summary(step), offer[0].digest()

        def new_plan(found: list[tuple[Summary, str]]) -> list[bool]:
            check_agreement([summary for summary, _ in found])
            return [self._planned != [digest for _, digest in found]] * len(found)

        if together(summary, new_plan):
            self._layout = layout_of(together(lambda: offer[0], self._make_plan))
        return on_first(lambda: self._draft(step))

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


def _remove(draft: Place) -> None:
    try:
        remove_folder(draft)
    except OSError:  # what stays goes with the next save
        return
