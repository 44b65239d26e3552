"""Saving behind the run: what is saved is the state at ``begin``, ``finish`` tells failures on every rank, damaged
checkpoints are set aside, and object stores work without a rename.
"""

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from upath import UPath

from deepseek_train.checkpoint import manifest as manifest_module
from deepseek_train.checkpoint import saver as saver_module
from deepseek_train.checkpoint.folders import newest
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.retention import Retention
from deepseek_train.checkpoint.saver import Saver
from deepseek_train.checkpoint.store import load, newest_good
from deepseek_train.config.schema import CheckpointConfig
from deepseek_train.train.saving import Saving
from tests.dist.checkpoint_states import FACTS, load_state, message, names, save_state, snapshot
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


# Damaged checkpoints


def find_good(rank: int, ranks: int, root: Path) -> str:
    return str(newest_good(root))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_checkpoints_are_set_aside_and_the_newest_good_one_is_taken(
    tmp_path: Path, ranks: int
) -> None:
    for step in range(1, 8):
        save_state(0, 1, tmp_path, step)
    folder = {step: tmp_path / f"step-{step:08}" for step in range(1, 8)}
    flip(folder[7] / "rank-00000.safetensors", -1)
    (folder[6] / "tensors.json").unlink()
    (folder[5] / "manifest.json").unlink()
    (folder[4] / "rank-00000.safetensors").write_bytes(b"")
    (folder[3] / "manifest.json").write_bytes(b"{]")
    flip(folder[2] / "tensors.json", 40)
    found = run_ranks(find_good, ranks, tmp_path)
    assert found == [str(folder[1])] * ranks
    assert names(tmp_path) == ["step-00000001"] + [f"step-{step:08}.bad" for step in range(2, 8)]
    why = {step: (tmp_path / f"step-{step:08}.bad" / "why-bad.txt").read_text() for step in range(2, 8)}
    assert "rank-00000.safetensors is damaged: its xxh3_128 is" in why[7]
    assert "tensors.json is missing" in why[6]
    assert "manifest.json cannot be read" in why[5]
    assert "rank-00000.safetensors has 0 bytes" in why[4]
    assert "manifest.json cannot be read" in why[3]
    assert "tensors.json is damaged" in why[2]


def find_good_blind(rank: int, ranks: int, root: Path, name: str) -> str:
    """Rank 1 sees nothing of the files called ``name``."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            seen = Path.is_file
            patch.setattr(Path, "is_file", lambda path: path.name != name and seen(path))
        return message(lambda: newest_good(root))


def test_a_rank_that_sees_another_folder_condemns_nothing(tmp_path: Path) -> None:
    run_ranks(save_state, 2, tmp_path)
    hidden = sorted(["rank-00000.safetensors", "rank-00001.safetensors", "tensors.json"])[1]  # rank 1's share
    one, two = run_ranks(find_good_blind, 2, tmp_path, hidden)
    assert one == two
    assert f"rank 1 finds: {tmp_path / 'step-00000007' / hidden} is missing" in one
    assert f"Mount the same {tmp_path} for all ranks" in one
    assert names(tmp_path) == ["step-00000007"]


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_a_disk_that_does_not_answer_condemns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save_state(0, 1, tmp_path)
    stat = Path.stat

    def stale(path: Path, **keywords: Any) -> os.stat_result:
        if path.name == name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **keywords)

    monkeypatch.setattr(Path, "stat", stale)
    if name != "manifest.json":
        monkeypatch.setattr(Path, "is_file", lambda path: path.name == name or os.path.isfile(path))
    text = message(lambda: newest_good(tmp_path))
    monkeypatch.undo()
    assert "Stale file handle" in text
    assert names(tmp_path) == ["step-00000007"]


# Object stores


def test_an_object_store_holds_checkpoints_too() -> None:
    root = UPath("memory://bucket/run")
    first = save_state(0, 1, root, 7)  # type: ignore[arg-type]
    save_state(0, 1, root, 8, seed=3)  # type: ignore[arg-type]
    save_state(0, 1, root, 8)  # type: ignore[arg-type]
    assert newest(root) == root / "step-00000008"
    assert load_state(0, 1, root / "step-00000008") == FACTS  # type: ignore[arg-type]
    manifest = root / "step-00000008" / "manifest.json"
    listed = json.loads(manifest.read_text())["files"]
    assert listed.keys() | {"manifest.json"} == {path.name for path in manifest.parent.iterdir()}
    tensors = root / "step-00000008" / "rank-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert newest_good(root) == first
    assert not manifest.exists()
    save_state(0, 1, root, 9, keep=1)  # type: ignore[arg-type]
    assert newest_good(root) == root / "step-00000009"
    assert not first.exists()


def test_a_checkpoint_of_another_version_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "FORMAT", 3)
    path = save_state(0, 1, tmp_path)
    monkeypatch.undo()
    assert "has format 3, this version reads format 2" in message(lambda: newest_good(tmp_path))
    assert names(tmp_path) == [path.name]
