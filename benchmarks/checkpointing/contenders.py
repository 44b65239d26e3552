"""Ways to save and load what a rank holds, each behind the same three functions."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.retention import Retention
from deepseek_train.checkpoint.saver import Saver
from deepseek_train.checkpoint.store import load


@dataclass(frozen=True)
class Sample:
    """One save and one load. Seconds, of the slowest rank."""

    stall: float  # the run waits for
    save: float  # until it is on disk
    load: float


@dataclass(frozen=True)
class Contender:
    """``save(state, folder)`` returns when the run may go on, with what waits for the rest."""

    name: str
    save: Callable[[dict[str, Tensor], Path], Callable[[], None]]
    load: Callable[[dict[str, Tensor], Path], None]


def measure(rank: int, ranks: int, mebibytes: int, rounds: int, root: Path) -> dict[str, list[Sample]]:
    """All contenders in turns, every rank with as much FP32 state of its own."""
    state = {f"master/{i}.{rank}": torch.rand(mebibytes << 16) for i in range(4)}
    contenders = _contenders(rank, ranks)
    found: dict[str, list[Sample]] = {one.name: [] for one in contenders}
    for number in range(rounds):
        for one in contenders:
            folder = root / f"{one.name.replace(' ', '-')}-{number}"
            found[one.name].append(_sample(one, state, folder))
            dist.barrier()
            if rank == 0:
                shutil.rmtree(folder)
            dist.barrier()
    return found


def _sample(one: Contender, state: dict[str, Tensor], folder: Path) -> Sample:
    expected = {name: tensor.clone() for name, tensor in state.items()}
    dist.barrier()
    started = time.perf_counter()
    wait = one.save(state, folder)
    stalled = time.perf_counter() - started
    wait()
    saved = time.perf_counter() - started
    for tensor in state.values():
        tensor.fill_(float("nan"))
    dist.barrier()
    started = time.perf_counter()
    one.load(state, folder)
    loaded = time.perf_counter() - started
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), (one.name, name)
    slowest = torch.tensor([stalled, saved, loaded])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return Sample(*slowest.tolist())


def _contenders(rank: int, ranks: int) -> list[Contender]:
    return [
        Contender("ours", *_ours()),
        Contender("ours at once", *_ours(at_once=True)),
        Contender("torch.save", lambda s, f: _torch_save(s, f, rank), lambda s, f: _torch_load(s, f, rank)),
        Contender("DCP", _dcp_save, _dcp_load),
        Contender("DCP async", _DcpAsync().save, _dcp_load),
    ]


def _snapshot(state: dict[str, Tensor]) -> Snapshot:
    return Snapshot([Piece(name, 0, len(tensor), tensor) for name, tensor in state.items()])


def _ours(
    at_once: bool = False,
) -> tuple[
    Callable[[dict[str, Tensor], Path], Callable[[], None]], Callable[[dict[str, Tensor], Path], None]
]:
    """One saver for all rounds, as a run has it; the folder is a link to where it saves."""
    savers: dict[Path, Saver] = {}

    def save(state: dict[str, Tensor], folder: Path) -> Callable[[], None]:
        root = folder.parent / "ours"
        saver = savers.setdefault(root, Saver(root, Retention(1)))
        saver.begin(1, _snapshot(state))

        def wait() -> None:
            path = saver.finish()
            if dist.get_rank() == 0:
                Path(str(path)).rename(folder)
            dist.barrier()

        if at_once:
            wait()
            return lambda: None
        return wait

    def fill(state: dict[str, Tensor], folder: Path) -> None:
        load(folder, _snapshot(state))

    return save, fill


def _torch_save(state: dict[str, Tensor], folder: Path, rank: int) -> Callable[[], None]:
    """With the fsync that torch leaves out: all contenders' files are on disk."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{rank}.pt").open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    dist.barrier()
    return lambda: None


def _torch_load(state: dict[str, Tensor], folder: Path, rank: int) -> None:
    for name, tensor in torch.load(folder / f"{rank}.pt", weights_only=True).items():
        state[name].copy_(tensor)


def _dcp_save(state: dict[str, Tensor], folder: Path) -> Callable[[], None]:
    dcp.save(state, checkpoint_id=folder)
    return lambda: None


class _DcpAsync:
    """With one stager for all rounds, as its documentation advises."""

    def __init__(self) -> None:
        self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def save(self, state: dict[str, Tensor], folder: Path) -> Callable[[], None]:
        future = dcp.async_save(state, checkpoint_id=folder, async_stager=self._stager)
        assert isinstance(future, Future)

        def wait() -> None:
            future.result()
            dist.barrier()

        return wait


def _dcp_load(state: dict[str, Tensor], folder: Path) -> None:
    dcp.load(state, checkpoint_id=folder)
