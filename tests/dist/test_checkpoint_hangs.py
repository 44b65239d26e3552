"""A disk that never answers: the file that is waited for is named, the wait is bounded, and the process leaves."""

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
from tests.harness import run_ranks


def of_value(value: float) -> Snapshot:
    return Snapshot([Piece("w", 0, 1000, torch.full((1000,), value))], {}, {"value": value})


def test_what_hangs_is_given_up_and_named_and_the_disk_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gate, original = threading.Event(), saver_module.write_tensor_file
    written = threading.Event()

    def hang(*arguments: Any) -> Any:
        gate.wait()
        try:
            return original(*arguments)
        finally:
            written.set()

    monkeypatch.setattr(behind, "SAY_SECONDS", 0.05)
    saver = Saver(tmp_path, Retention(1), patience_seconds=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "write_tensor_file", hang)
        saver.begin(1, of_value(1.0))
        with pytest.raises(
            StorageFailed, match=r"step-00000001\..*rank-00000.safetensors is not written after"
        ):
            saver.finish()
        assert "rank 0 has waited 0 s for the disk: writing " in capfd.readouterr().err
        saver.begin(2, of_value(2.0))
        assert "an earlier save still holds up the disk: writing " in message(saver.finish)
    gate.set()
    assert written.wait(20)
    saver = Saver(tmp_path, Retention(1))
    saver.begin(3, of_value(3.0))
    saver.finish()
    saver.close()
    assert names(tmp_path) == ["step-00000003"]


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
