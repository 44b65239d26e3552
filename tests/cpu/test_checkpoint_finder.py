"""One finder for every command: what a place means, and which checkpoint there is taken."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.errors import CheckpointError, NoCheckpoint
from deepseek_train.checkpoint.finder import CONFIG_FILE, candidates, checkpoints_at
from deepseek_train.checkpoint.folders import CHECKPOINTS
from deepseek_train.checkpoint.stored import newest_whole


def zeros(_: str, start: int, end: int) -> Iterator[Tensor]:
    yield torch.zeros(end - start)


def save(root: Path, *steps: int) -> Path:
    for step in steps:
        write_alone(root, step, [Planned("w", torch.float32, 3)], zeros, {})
    return root


def damage(checkpoint: Path) -> None:
    next(checkpoint.glob("*.safetensors")).write_bytes(b"")


def test_a_run_its_folder_of_checkpoints_and_one_of_them(tmp_path: Path) -> None:
    root = save(tmp_path / "run" / CHECKPOINTS, 5, 10)
    for place in (tmp_path / "run", root):
        assert [one.step for one in candidates(place)] == [10, 5]
        assert newest_whole(place).path == root / "step-00000010"
    assert newest_whole(root / "step-00000005").step == 5
    with pytest.raises(NoCheckpoint, match="holds no checkpoint"):
        candidates(tmp_path)


def test_a_run_that_keeps_them_elsewhere(tmp_path: Path) -> None:
    """Where checkpoint.path says, though its own folder has some of an earlier session."""
    elsewhere = save(tmp_path / "elsewhere", 7)
    save(tmp_path / "run" / CHECKPOINTS, 9)
    config = tmp_path / "run" / CONFIG_FILE
    config.write_text(f"checkpoint: {{path: {elsewhere}}}\n")
    assert checkpoints_at(tmp_path / "run") == elsewhere
    assert newest_whole(tmp_path / "run").step == 7
    for own in ("checkpoint: {path: null}", "checkpoint: [", "- 1", ""):
        config.write_text(own)
        assert newest_whole(tmp_path / "run").step == 9


def test_damaged_ones_are_passed_over_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002")
    assert newest_whole(tmp_path).step == 1
    assert "passed over: " in caplog.text
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000002.* has 0 bytes"):
        newest_whole(tmp_path / "step-00000002")
    damage(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="step-00000001.* has 0 bytes"):
        newest_whole(tmp_path)
    assert len(candidates(tmp_path)) == 2
