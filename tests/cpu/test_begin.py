"""Where a run begins, as far as that is decided before a weight is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.folders import set_aside
from deepseek_train.cli.compose import compose_config
from deepseek_train.train import begin as begin_module
from deepseek_train.train.begin import NoGoodCheckpoint, begin
from deepseek_train.train.folder import note_saved


def job(*overrides: str) -> Any:
    """All of a job that is asked."""
    return SimpleNamespace(config=compose_config(["experiment=tiny", *overrides]))


def weights_alone(root: Path) -> Path:
    planned = [Planned("master/w", torch.float32, 2)]
    return Path(str(write_alone(root, 0, planned, lambda *_: iter([torch.zeros(2)]), {"step": 0})))


def test_a_folder_of_weights_alone_says_how_to_begin_with_them(tmp_path: Path) -> None:
    path = weights_alone(tmp_path)
    with pytest.raises(CheckpointError, match=f"begin one with them, init_from={path}"):
        begin(job(), tmp_path)


def test_where_all_are_damaged_only_resume_never_begins_anew(tmp_path: Path) -> None:
    set_aside(weights_alone(tmp_path), "a flipped bit")
    with pytest.raises(NoGoodCheckpoint, match="step-00000000.bad are damaged"):
        begin(job(), tmp_path)
    assert begin(job("resume=never"), tmp_path).progress.step == 0


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path: Path, resume: str) -> None:
    """A disk that is not mounted, a moved folder, or somebody who made room: only resume=never begins anew."""
    run, root = tmp_path / "run", tmp_path / "not mounted"
    assert begin(job(f"run_dir={run}"), root).progress.step == 0
    run.mkdir()
    note_saved(run, 12, root / "step-00000012")
    with pytest.raises(NoGoodCheckpoint, match="step 12 was saved at .*/not mounted/step-00000012, and"):
        begin(job(f"run_dir={run}", f"resume={resume}"), root)
    assert begin(job(f"run_dir={run}", "resume=never"), root).progress.step == 0


def test_weights_to_begin_with_are_the_newest_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is damaged in another run's folder is passed over, and left there."""
    other, taken = tmp_path / "other", []
    monkeypatch.setattr(begin_module, "load_weights", lambda _, path: taken.append(path))
    planned = [Planned("master/w", torch.float32, 2)]
    for step in (1, 2):
        write_alone(other / "checkpoints", step, planned, lambda *_: iter([torch.zeros(2)]), {})
    newest = other / "checkpoints" / "step-00000002"
    (newest / "tensors.json").unlink()
    begun = begin(job(f"init_from={other}"), tmp_path / "own")
    assert [path.name for path in taken] == ["step-00000001"]
    assert "step-00000001, a new optimizer" in begun.how
    assert "passed over: " in caplog.text
    assert newest.exists()
    with pytest.raises(CheckpointError, match="step-00000002/tensors.json is missing"):
        begin(job(f"init_from={newest}"), tmp_path / "own")
