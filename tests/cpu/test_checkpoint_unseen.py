"""An object store that does not answer: fsspec's ``exists`` and ``isdir`` say no then; nothing may follow from that."""

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.errors import CheckpointUnreadable, StorageFailed
from deepseek_train.checkpoint.finder import candidates
from deepseek_train.checkpoint.folders import committed, new_draft, set_aside_in, sweep
from deepseek_train.checkpoint.places import Place, is_there, listed, remove_folder
from deepseek_train.checkpoint.store import newest_good
from deepseek_train.cli.compose import compose_config
from deepseek_train.train.begin import begin


@pytest.fixture
def root(tmp_path: Path) -> Place:
    """Two checkpoints."""
    root = UPath(f"memory://unseen/{tmp_path.name}")
    planned = [Planned("w", torch.float32, 2)]
    for step in (1, 2):
        write_alone(root, step, planned, lambda *_: iter([torch.zeros(2)]), {})
    return root


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes a call of the store fail for all paths with this end."""

    def fail(call: str, end: str) -> None:
        original = getattr(MemoryFileSystem, call)

        def failing(self: MemoryFileSystem, path: str, *args: Any, **keywords: Any) -> Any:
            if path.endswith(end):
                raise OSError(errno.EIO, "Input/output error")
            return original(self, path, *args, **keywords)

        monkeypatch.setattr(MemoryFileSystem, call, failing)

    return fail


def test_a_silent_store_is_not_an_empty_one(
    root: Place, silent: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job: Any = SimpleNamespace(config=compose_config(["experiment=tiny"]))
    for call in ("info", "ls"):
        silent(call, "")
    asked: tuple[Callable[[], object], ...] = (
        lambda: committed(root),
        lambda: candidates(root),
        lambda: new_draft(root, 2),
        lambda: set_aside_in(root),
    )
    for ask in asked:
        with pytest.raises((CheckpointUnreadable, OSError), match="Input/output error"):
            ask()
    for ask in (lambda: newest_good(root), lambda: begin(job, root)):
        with pytest.raises(StorageFailed, match="Input/output error"):
            ask()
    monkeypatch.undo()
    assert [one.step for one in committed(root)] == [2, 1]
    assert newest_good(root) == root / "step-00000002"


@pytest.mark.parametrize("end", ["safetensors", "tensors.json", "manifest.json"])
def test_a_file_that_cannot_be_looked_at_condemns_nothing(
    root: Place, silent: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    silent("info", end)
    with pytest.raises(StorageFailed, match=f"{end} cannot be read: Input/output error"):
        newest_good(root)
    sweep(root, 2)
    if end == "manifest.json":
        with pytest.raises(OSError, match="Input/output error"):
            remove_folder(root / "step-00000001")
    monkeypatch.undo()
    assert set_aside_in(root) == []
    assert newest_good(root) == root / "step-00000002"


def test_what_is_there_and_what_is_not(root: Place, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_there(root)
    assert is_there(root / "step-00000001")
    assert not is_there(root / "step-00000003")
    assert not is_there(tmp_path / "file" / "inside")
    assert listed(tmp_path / "file") == listed(tmp_path / "none") == listed(root / "none") == []
    assert sorted(path.name for path in listed(root)) == ["step-00000001", "step-00000002"]
    assert listed(UPath(f"file://{tmp_path}")) == [UPath(f"file://{tmp_path}/file")]
