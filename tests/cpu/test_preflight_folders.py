"""What a launch finds in folders before anything starts: an earlier run, its configuration, weights to begin with."""

import contextlib
import errno
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.finder import CONFIG_FILE
from deepseek_train.checkpoint.folders import CHECKPOINTS
from deepseek_train.data.manifest import TOKENIZER_FILE
from deepseek_train.train.folder import (
    OUTCOME_FILE,
    as_json,
    config_yaml,
    note_outcome,
    open_folder,
    write_config,
)
from deepseek_train.train.preflight import preflight
from tests.helpers.preflight import tiny, told


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_from_before_a_field_existed_goes_on() -> None:
    """What its configuration does not say is what it then was; what it says otherwise is still refused."""
    before = yaml.safe_load(config_yaml(tiny()))
    for field in ("ep_across_mirrors", "layers"):
        del before["parallel"][field]
    folder = Path(before["run_dir"])
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(before))
    assert told() == []
    assert told("parallel.dispatcher=flat", "parallel.check_splits=true") == []
    ((where, said),) = told("precision.dispatch=bf16")
    assert where == "precision"
    assert "dispatch was params, is bf16" in said
    assert told("parallel.layers=2|1") == []  # any layout reads any checkpoint
    ((where, said),) = told("data.fim_rate=0.5")
    assert where == "data"
    assert "fim_rate was 0.1, is 0.5" in said
    assert told("data.fim_rate=0.5", "data.allow_change=true") == []


def test_the_run_folder_and_what_is_beside_it_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is read-only may be mended; the lock lies beside the folder, checkpoints perhaps elsewhere."""
    folder = Path(tiny().run_dir)
    folder.mkdir(parents=True)
    Path("elsewhere").mkdir()
    for where, error, passes in (
        (folder, errno.EROFS, True),
        (folder.absolute().parent, errno.EROFS, True),
        (folder, errno.EACCES, False),
        (Path("elsewhere"), errno.ENOSPC, True),
    ):
        key = "checkpoint.path" if where == Path("elsewhere") else "run_dir"

        def refused(dir: Path, where: Path = where, error: int = error) -> contextlib.nullcontext[None]:
            if dir == where:
                raise OSError(error, "no")
            return contextlib.nullcontext()

        monkeypatch.setattr(tempfile, "TemporaryFile", refused)
        (problem,) = preflight(tiny("checkpoint.path=elsewhere/ck"), None)
        assert (problem.where, problem.storage) == (key, passes)
        assert f"cannot write to {where}" in problem.what


def test_weights_to_begin_with_are_looked_at(tmp_path: Path) -> None:
    def store(name: str, **facts: object) -> str:
        planned = [Planned("master/w", torch.float32, 2)]
        root = tmp_path / name / CHECKPOINTS
        write_alone(root, 3, planned, lambda _, start, end: iter([torch.zeros(end - start)]), facts)
        return f"init_from={tmp_path / name}"

    model = as_json(tiny().model)
    assert told(store("same", model=model | {"name": "other", "rope_theta": 1e6})) == []
    ((where, said),) = told(store("wider", model=model | {"hidden_size": 256}))
    assert where == "init_from"
    assert "hidden_size was 256, is 128" in said
    ((_, said),) = told(store("silent"))
    assert "does not say of which model it is" in said
    ((_, said),) = told(f"init_from={tmp_path / 'nowhere'}")
    assert "holds no checkpoint" in said
    hugging_face = tmp_path / "hugging_face"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text("{}")
    ((_, said),) = told(f"init_from={hugging_face}")
    assert f"deepseek-convert from_hf source={hugging_face}" in said
    ((_, said),) = told("init_from=nowhere://here")
    assert "Unsupported filesystem: 'nowhere'" in said


def test_a_run_with_a_checkpoint_does_not_ask_for_what_it_began_with(tmp_path: Path) -> None:
    gone = f"init_from={tmp_path / 'deleted meanwhile'}"
    assert [where for where, _ in told(gone)] == ["init_from"]
    root = Path(tiny().run_dir) / CHECKPOINTS
    write_alone(
        root, 3, [Planned("w", torch.float32, 2)], lambda _, start, end: iter([torch.zeros(end - start)]), {}
    )
    assert told(gone) == []
    assert [where for where, _ in told(gone, "resume=never")] == ["init_from"]


def test_a_place_for_checkpoints_that_nothing_knows_is_a_problem() -> None:
    ((where, said),) = told("checkpoint.path=nowhere://here")
    assert where == "checkpoint.path"
    assert "Unsupported filesystem: 'nowhere'" in said


@pytest.mark.parametrize("content", ["", "data: [", "- 1", "model: {}"])
def test_a_configuration_that_was_cut_off_is_a_problem(content: str) -> None:
    folder = Path(tiny().run_dir)
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(content)
    ((where, said),) = told()
    assert where == "run_dir"
    assert str(folder / CONFIG_FILE) in said


def test_a_write_that_is_cut_off_leaves_the_configuration_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tiny(), tmp_path)
    before = (tmp_path / CONFIG_FILE).read_text()
    original = Path.write_bytes

    def killed(path: Path, content: bytes) -> int:
        original(path, content[:9])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            write_config(tiny(), tmp_path)
    assert (tmp_path / CONFIG_FILE).read_text() == before


def test_a_session_begins_without_the_outcome_of_the_one_before(tmp_path: Path) -> None:
    """Else a run that was complete, went on for more tokens and crashed would count as complete."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / TOKENIZER_FILE).touch()
    config = tiny(f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}")
    folder = open_folder(config)
    note_outcome(folder, complete=True, step=9)
    assert open_folder(config) == folder
    assert not (folder / OUTCOME_FILE).exists()
