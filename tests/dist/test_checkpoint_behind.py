"""Saving behind the run: what is saved is the state at ``begin``, ``finish`` tells failures on every rank."""

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_train.checkpoint import saver as saver_module
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.folders import newest
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.retention import Retention
from deepseek_train.checkpoint.saver import Saver
from deepseek_train.checkpoint.store import load
from deepseek_train.config.schema import CheckpointConfig
from deepseek_train.train.saving import Saving
from tests.dist.checkpoint_states import load_state, message, names, save_state, snapshot
from tests.harness import run_ranks


def of_value(value: float) -> Snapshot:
    return Snapshot([Piece("w", 0, 1000, torch.full((1000,), value))], {}, {"value": value})


def test_the_state_is_that_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, original = threading.Event(), saver_module.write_tensor_file

    def slow(*arguments: Any) -> Any:
        assert gate.wait(20)
        return original(*arguments)

    monkeypatch.setattr(saver_module, "write_tensor_file", slow)
    saver, state = Saver(tmp_path, Retention(2)), of_value(1.0)
    saver.begin(1, state)
    state.pieces[0].tensor.fill_(2.0)  # the run goes on
    assert saver.running == 1
    assert saver.writing
    assert newest(tmp_path) is None
    gate.set()
    path = saver.finish()
    saver.begin(2, state)  # into the same host memory
    saver.finish()
    saver.close()
    for step, value in ((path, 1.0), (tmp_path / "step-00000002", 2.0)):
        found = of_value(0.0)
        load(step, found)
        assert torch.equal(found.pieces[0].tensor, torch.full((1000,), value))


def fail_on_rank_1(rank: int, ranks: int, root: Path, error: Exception) -> str:
    saver = Saver(root, Retention(2))

    def fail(*_: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(saver_module, "write_tensor_file", fail)
        saver.begin(8, snapshot(rank, ranks, 2))
        try:
            saver.finish()
        except CheckpointError as told:
            return type(told).__name__
    return "nothing"


def test_a_disks_failure_is_told_as_one(tmp_path: Path) -> None:
    """On all ranks: what ends a run decides whether it is started again."""
    for error, told in (
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "StorageFailed"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "CheckpointError"),
        (ValueError("a bug"), "CheckpointError"),
    ):
        assert run_ranks(fail_on_rank_1, 2, tmp_path, error) == [told, told]


def begin_on_a_broken_rank(rank: int, ranks: int, root: Path) -> tuple[str, str, str]:
    saver = Saver(root, Retention(2))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(
                saver_module, "write_tensor_file", lambda *_: (root / "nowhere" / "x").write_bytes(b"")
            )
        saver.begin(8, snapshot(rank, ranks, 2))
        first = message(saver.finish)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch.Tensor, "copy_", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
        saver = Saver(root, Retention(2))
        saver.begin(8, snapshot(rank, ranks, 2))
        second = message(saver.finish)
    saver.begin(8, snapshot(rank, ranks, 1))  # the disk is mended
    saver.finish()
    return first, second, str(newest(root))


def test_a_failure_behind_the_run_is_told_to_all_and_costs_nothing(tmp_path: Path) -> None:
    old = run_ranks(save_state, 2, tmp_path)[0]
    one, two = run_ranks(begin_on_a_broken_rank, 2, tmp_path)
    assert one == two
    assert "nowhere" in one[0]
    assert "[rank 1]" in one[0]
    assert "MemoryError: full [rank 1]" in one[1]
    assert one[2] == str(tmp_path / "step-00000008")
    assert names(tmp_path) == [old.name, "step-00000008"]
    run_ranks(load_state, 2, tmp_path / "step-00000008")


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "free_bytes", lambda _: 3999)
    text = message(lambda: Saver(tmp_path, Retention(1)).begin(1, of_value(1.0)))
    assert "make room" in text
    assert names(tmp_path) == []


def test_failed_saves_are_tried_again_and_end_a_run_only_in_a_row(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    broken = Saver(tmp_path / "file" / "checkpoints", Retention(1))
    saving = Saving(broken, CheckpointConfig(every=100, max_failures=4), said.append)
    tried: list[int] = []

    def go_on() -> None:
        for step in range(100, 300):
            if saving.due(step):
                tried.append(step)
                saving.begin(step, lambda: of_value(1.0))

    assert "4 saves in a row failed" in message(go_on)
    assert tried == [100, 101, 103, 107]
    assert len(said) == 4
    assert "step 100 was not saved (failure 1 of 4 in a row)" in said[0]

    whole = Saving(Saver(tmp_path / "good", Retention(1)), CheckpointConfig(every=100), said.append)
    whole.begin(100, lambda: of_value(1.0))
    whole.begin(200, lambda: of_value(2.0))  # waits for the first, and says so
    assert "step 200 waits" in "".join(said)
    whole.finish()
    assert not whole.running
    whole.close()
    assert names(tmp_path / "good") == ["step-00000200"]


def test_a_save_that_fails_behind_the_run_is_tried_again_though_its_turn_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = Saving(Saver(tmp_path, Retention(1)), CheckpointConfig(every=100), lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "write_tensor_file", lambda *_: (tmp_path / "no" / "x").write_bytes(b""))
        saving.begin(100, lambda: of_value(1.0))
        saving.finish()  # the run is at step 105 by then
    assert saving.due(106)
    saving.begin(106, lambda: of_value(1.0))
    saving.finish()
    assert not saving.due(107)
    saving.close()
    assert names(tmp_path) == ["step-00000106"]


def test_a_save_put_off_is_due_at_the_next_step(tmp_path: Path) -> None:
    saving = Saving(Saver(tmp_path, Retention(1)), CheckpointConfig(every=100), lambda _: None)
    saving.begin(100, lambda: of_value(1.0))
    saving.put_off(200)
    saving.finish()
    assert saving.due(201)
    saving.begin(201, lambda: of_value(2.0))
    assert not saving.due(202)
    saving.settle()
    saving.close()


def test_the_last_save_is_insisted_on_however_many_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "full" / "checkpoints"
    (tmp_path / "full").touch()
    saving = Saving(Saver(root, Retention(1)), CheckpointConfig(max_failures=2), lambda _: None)
    saving.begin(1, lambda: of_value(1.0))
    pauses: list[float] = []

    def mended_in_the_third_pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            (tmp_path / "full").unlink()

    monkeypatch.setattr("deepseek_train.train.saving.time.sleep", mended_in_the_third_pause)
    saving.insist(2, lambda: of_value(2.0))
    saving.close()
    assert names(root) == ["step-00000002"]


def test_nothing_is_being_deleted_once_it_has_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rollback wants it, which looks at all folders there are."""
    original = saver_module.retire

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)
        original(*arguments)

    monkeypatch.setattr(saver_module, "retire", slow)
    saving = Saving(Saver(tmp_path, Retention(1)), CheckpointConfig(), lambda _: None)
    for step in (1, 2):
        saving.begin(step, lambda: of_value(1.0))
        saving.settle()
    assert names(tmp_path) == ["step-00000002"]
    saving.close()
