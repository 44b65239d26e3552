"""Damaged checkpoints are set aside, and only those; object stores work without a rename."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from upath import UPath

from deepseek_train.checkpoint import manifest as manifest_module
from deepseek_train.checkpoint.folders import newest, set_aside_in
from deepseek_train.checkpoint.store import newest_good
from deepseek_train.checkpoint.stored import StoredCheckpoint
from tests.dist.checkpoint_states import FACTS, load_state, message, names, save_state
from tests.harness import run_ranks


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
            stat = Path.stat

            def unseen(path: Path, **keywords: Any) -> os.stat_result:
                if path.name == name:
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory")
                return stat(path, **keywords)

            patch.setattr(Path, "stat", unseen)
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
    again = root / "step-00000008.2"
    assert newest(root) == again
    assert not (root / "step-00000008").exists()
    assert load_state(0, 1, again) == FACTS  # type: ignore[arg-type]
    manifest = again / "manifest.json"
    listed = json.loads(manifest.read_text())["files"]
    assert listed.keys() | {"manifest.json"} == {path.name for path in manifest.parent.iterdir()}
    tensors = again / "rank-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert newest_good(root) == first
    assert not manifest.exists()
    save_state(0, 1, root, 9, keep=1)  # type: ignore[arg-type]
    assert newest_good(root) == root / "step-00000009"
    assert not first.exists()
    assert set_aside_in(root) == [again]


def test_an_object_store_holds_one_whole_checkpoint_at_every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is saved again, and again: before each write and each deletion there the newest is whole."""
    root = UPath("memory://bucket/same-step")
    save_state(0, 1, root, 8, keep=1)  # type: ignore[arg-type]
    leftover = root / "step-00000008.2"  # of a save that was killed
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    moments: list[str] = []

    def check_first(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def checked(*args: Any, **kwargs: Any) -> Any:
            found = newest(root)
            assert found is not None
            moments.append(StoredCheckpoint.open(found).path.name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, checked)

    check_first(MemoryFile, "commit")
    check_first(MemoryFileSystem, "rm_file")
    for seed in (2, 3):
        save_state(0, 1, root, 8, seed=seed, keep=1)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert [*dict.fromkeys(moments)] == ["step-00000008", "step-00000008.2", "step-00000008.3"]
    assert [path.name for path in root.iterdir()] == ["step-00000008.3"]


def test_a_checkpoint_of_another_version_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "FORMAT", 3)
    path = save_state(0, 1, tmp_path)
    monkeypatch.undo()
    assert "has format 3, this version reads format 2" in message(lambda: newest_good(tmp_path))
    assert names(tmp_path) == [path.name]
