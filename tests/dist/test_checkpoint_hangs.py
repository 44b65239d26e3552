"""A disk that never answers: the file that is waited for is named, the wait is bounded, and the process leaves."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_train.checkpoint import behind
from deepseek_train.checkpoint import saver as saver_module
from deepseek_train.checkpoint.errors import StorageFailed
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.retention import Retention
from deepseek_train.checkpoint.saver import Saver
from deepseek_train.watch.whereabouts import SLOT_BYTES, Whereabouts
from tests.dist.checkpoint_states import message, names, snapshot
from tests.faults.commands import until
from tests.harness import run_ranks


def of_value(value: float) -> Snapshot:
    return Snapshot([Piece("w", 0, 1000, torch.full((1000,), value))], {}, {"value": value})


class HungDisk:
    """From now on ``name`` of the saver hangs until ``answers`` is called, and then does its work."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, where: Whereabouts) -> None:
        self._gate, self._original, self._where = threading.Event(), getattr(saver_module, name), where
        self.seen: list[str] = []  # what the main thread was at
        patch.setattr(saver_module, name, self._hang)
        self.answers = self._gate.set

    def _hang(self, *arguments: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        self.seen.append(self._where.seen(0).place)
        self._gate.wait()
        return self._original(*arguments)


def save(saver: Saver, step: int, state: Snapshot) -> None:
    saver.begin(step, state)
    saver.finish()
    saver.settle()


def saved(saver: Saver, step: int) -> bool:
    """Whether it could be; the same on all ranks."""
    try:
        save(saver, step, of_value(3.0))
    except StorageFailed:
        return False
    return True


GIVEN_UP = {  # by what hangs: what is told, and what the main thread is at
    "write_tensor_file": (
        r"writing \S*step-00000001\.\S*/rank-00000.safetensors",
        "until step-00000001.tmp-",
    ),
    "new_draft": ("a draft in ", "a draft in "),
    "commit": (r"manifest and rename of \S*step-00000001\.", "manifest and rename of "),
    "remove_folder": ("a draft in ", ""),
    "retire": ("deletions", ""),
}


@pytest.mark.parametrize("what", GIVEN_UP)
def test_what_hangs_is_given_up_and_named_and_the_disk_may_come_back(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(behind, "SAY_SECONDS", 0.05)
    where = Whereabouts(memoryview(bytearray(SLOT_BYTES)))
    saver = Saver(tmp_path, Retention(1), where, patience_seconds=0.5)
    if what == "remove_folder":  # of the draft of a save that failed
        with monkeypatch.context() as patch:
            patch.setattr(saver_module, "write_tensor_file", lambda *_: (tmp_path / "no" / "x").touch())
            saver.begin(1, of_value(1.0))
            disk = HungDisk(monkeypatch, what, where)
            assert "No such file" in message(saver.finish)
    else:
        disk = HungDisk(monkeypatch, what, where)
    told, at = GIVEN_UP[what]
    with pytest.raises(StorageFailed, match=f"^{told}.* is not done after 0 s: see to the disk"):
        save(saver, 1, of_value(1.0))
    assert at in disk.seen[0]
    assert re.search("rank 0 has waited 0 s for the disk: .", capfd.readouterr().err)
    for _ in range(2):
        assert "an earlier save still holds up the disk: " in message(lambda: saver.begin(2, of_value(2.0)))
    disk.answers()
    until(lambda: saved(saver, 3), 60)
    saver.close()
    assert names(tmp_path) == ["step-00000003"]


def hang_on_a_rank(rank: int, ranks: int, root: Path, what: str, which: int) -> list[str]:
    told = []
    with pytest.MonkeyPatch.context() as patch:
        saver = Saver(root, Retention(1), patience_seconds=0.5)
        disk = HungDisk(patch, what, Whereabouts.unseen()) if rank == which else None

        told.append(message(lambda: save(saver, 1, snapshot(rank, ranks, 1))))
        if rank == 0:
            patch.setattr(saver_module, "sweep", lambda *_: told.append("the disk was touched"))
        told.append(message(lambda: saver.begin(2, snapshot(rank, ranks, 2))))
        if disk is not None:
            disk.answers()
            saver.close()
    return told


@pytest.mark.parametrize(
    ("what", "which", "given_up"),
    [("write_tensor_file", 1, "rank-00001.safetensors"), ("retire", 0, "deletions")],
)
def test_all_ranks_give_up_what_hangs_on_one(tmp_path: Path, what: str, which: int, given_up: str) -> None:
    one, other = run_ranks(hang_on_a_rank, 2, tmp_path, what, which)
    assert one == other
    first, second = one
    assert f"{given_up} is not done after" in first
    assert "an earlier save still holds up the disk" in second
    assert second.endswith(f"[rank {which}]")


LEAVES = """
import threading, sys
from pathlib import Path
from deepseek_train.checkpoint import saver as saver_module
from deepseek_train.checkpoint.retention import Retention
from tests.dist.test_checkpoint_hangs import of_value

never = threading.Event()
saver_module.LEAVING_SECONDS = 0.1
saver = saver_module.Saver(Path(sys.argv[1]), Retention(1))
if sys.argv[2] == "writing":
    saver_module.write_tensor_file = lambda *_: never.wait()
    saver.begin(1, of_value(1.0))
    raise SystemExit(3)
saver_module.retire = lambda *_: never.wait()
saver.begin(1, of_value(1.0))
saver.finish()
saver.close()
"""


@pytest.mark.parametrize(("what", "code"), [("writing", 3), ("deleting", 0)])
def test_a_process_leaves_though_its_disk_hangs(tmp_path: Path, what: str, code: int) -> None:
    command = [sys.executable, "-c", LEAVES, str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)  # it would hang for ever
    assert done.returncode == code, done.stderr
    told = f"leaves without waiting for the disk any longer: deleting old checkpoints in {tmp_path}"
    assert (told in done.stderr) == (what == "deleting")


def seen_while_rank_0_writes(rank: int, ranks: int, root: Path) -> str:
    """What this rank is at by its own words; rank 0's file waits until both have looked."""
    where, found, original = (
        Whereabouts(memoryview(bytearray(SLOT_BYTES))),
        [],
        saver_module.write_tensor_file,
    )

    def late(*arguments: Any) -> Any:
        while len([*root.glob("seen-*")]) < ranks:
            time.sleep(0.01)
        return original(*arguments)

    def look() -> None:
        at = "until" if rank == 0 else "checkpoint's files: the verdict"
        while at not in (sight := where.seen(rank)).place:
            time.sleep(0.01)
        found.append(f"{'waits' if sight.waiting else 'works'}: {sight.place}")
        (root / f"seen-{rank}").touch()

    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(saver_module, "write_tensor_file", late)
        saver, watcher = Saver(root, Retention(1), where), threading.Thread(target=look)
        watcher.start()
        saver.begin(1, snapshot(rank, ranks, 1))
        saver.finish()
        watcher.join()
        saver.close()
    return found[0]


def test_a_watchdog_sees_who_is_waited_for(tmp_path: Path) -> None:
    slow, other = run_ranks(seen_while_rank_0_writes, 2, tmp_path)
    assert slow.startswith("works: ")
    assert "until step-00000001.tmp-" in slow
    assert "/rank-00000.safetensors is written" in slow
    assert other.startswith("waits: ")
    assert other.endswith("in transfer: checkpoint's files: the verdict of all ranks")
