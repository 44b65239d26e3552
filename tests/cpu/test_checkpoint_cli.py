"""``deepseek-checkpoint`` as a user types it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.folders import CHECKPOINTS, committed, new_draft, set_aside, set_aside_in
from deepseek_train.checkpoint.stored import StoredCheckpoint
from deepseek_train.cli.checkpoint import main

LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 40: None}


def ones(_: str, start: int, end: int) -> Iterator[Tensor]:
    yield torch.arange(start, end, dtype=torch.float32)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with four checkpoints and a damaged one that was set aside."""
    for step, loss in LOSSES.items():
        facts = {
            "tokens": step * 1000,
            "layout": {"pp": 2, "dp": 4, "mirrored": False},
            "validation_loss": loss,
        }
        write_alone(tmp_path / CHECKPOINTS, step, [Planned("w", torch.float32, 100)], ones, facts, 200)
    bad = write_alone(tmp_path / CHECKPOINTS, 50, [Planned("w", torch.float32, 1)], ones, {})
    set_aside(bad, "a file is torn")
    return tmp_path


def test_what_was_set_aside_stays_when_its_step_is_set_aside_again(run: Path) -> None:
    root = run / CHECKPOINTS
    for other in ("an index is gone", "a manifest is garbled"):
        set_aside(write_alone(root, 50, [Planned("w", torch.float32, 1)], ones, {}), other)
    found = {path.name: (path / "why-bad.txt").read_text() for path in set_aside_in(root)}
    assert found == {
        "step-00000050.bad": "a file is torn\n",
        "step-00000050.bad.2": "an index is gone\n",
        "step-00000050.bad.3": "a manifest is garbled\n",
    }
    assert [one.step for one in committed(root)] == [40, 30, 20, 10]


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (run / CHECKPOINTS).iterdir() if path.suffix != ".bad")


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 40", "step 30", "step 20", "step 10", "damaged"]
    assert "30.0k tokens  pp 2 dp 4  2 files" in lines[1]
    assert "validation loss 2.5000" in lines[1]
    assert "a file is torn" in lines[4]
    assert main(["ls", str(run / CHECKPOINTS / "step-00000020")]) == 0
    assert "step 20" in capsys.readouterr().out
    assert main(["ls", str(run / "nothing")]) == 3


def test_verify_names_all_that_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("all as the manifest says") == 4
    torn = run / CHECKPOINTS / "step-00000020" / "rank-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    (run / CHECKPOINTS / "step-00000030" / "tensors.json").unlink()
    assert main(["verify", str(run)]) == 1
    said = capsys.readouterr()
    assert f"{torn} is damaged" in said.err
    assert "step-00000030/tensors.json is missing" in said.err
    assert said.out.count("all as the manifest says") == 2


def test_reshard_keeps_every_bit_and_replaces_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = run / "moved"
    assert main(["reshard", f"source={run}", f"target={target}", "files=4"]) == 0
    made = Path(capsys.readouterr().out.strip())
    assert made == target / "step-00000040"
    assert len(list(made.glob("*.safetensors"))) == 4
    assert torch.equal(StoredCheckpoint.open(made).read("w"), torch.arange(100.0))
    assert main(["reshard", f"source={run}", f"target={target}"]) == 1
    assert "is a checkpoint of step 40 already" in capsys.readouterr().err


def test_reshard_into_a_running_run_leaves_its_draft_alone(run: Path, tmp_path: Path) -> None:
    live = tmp_path / "live" / CHECKPOINTS
    draft = new_draft(live, 30)  # a save under way
    assert main(["reshard", f"source={run}", f"target={live}"]) == 0
    assert draft.exists()
    with pytest.raises(CheckpointError):
        write_alone(live, 31, [Planned("w", torch.float32, 1)], fails, {})
    assert sorted(path.name for path in live.iterdir()) == sorted(["step-00000040", draft.name])


def fails(*_: object) -> Iterator[Tensor]:
    raise CheckpointError("no disk")
    yield


def test_prune_says_first_and_does_when_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", str(run), "last=1", "best=1", "every=30", "bad=true"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("would delete") == 2
    assert "step-00000010" in said
    assert "step-00000050.bad" in said
    assert steps(run) == [10, 20, 30, 40]
    assert main([*words, "dry=false"]) == 0
    assert steps(run) == [20, 30, 40]
    assert not list((run / CHECKPOINTS).glob("*.bad"))


def test_prune_counts_only_what_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest one is damaged: the one before is kept in its stead, and the damaged one stays to be looked at."""
    torn = run / CHECKPOINTS / "step-00000040" / "rank-00000.safetensors"
    torn.write_bytes(b"")
    assert main(["prune", str(run), "last=1", "dry=false"]) == 1
    said = capsys.readouterr()
    assert said.out.count("deleted") == 2
    assert f"{torn} has 0 bytes" in said.err
    assert steps(run) == [30, 40]
    (run / CHECKPOINTS / "step-00000030" / "tensors.json").unlink()
    assert main(["prune", str(run), "last=1", "dry=false"]) == 1
    assert steps(run) == [30, 40]


def test_prune_keeps_the_best_of_what_is_whole(run: Path) -> None:
    (run / CHECKPOINTS / "step-00000020" / "tensors.json").write_bytes(b"{}")
    assert main(["prune", str(run), "last=1", "best=1", "dry=false"]) == 1
    assert steps(run) == [20, 30, 40]


def test_where_only_damaged_ones_are_left_they_are_told_and_deleted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in LOSSES:
        shutil.rmtree(run / CHECKPOINTS / f"step-{step:08}")
    assert main(["ls", str(run)]) == 3
    assert "a file is torn" in capsys.readouterr().out
    assert main(["prune", str(run), "bad=true"]) == 3
    assert "would delete" in capsys.readouterr().out
    assert main(["prune", str(run), "bad=true", "dry=false"]) == 3
    assert not list((run / CHECKPOINTS).iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lst", "x"], "'lst' is not one of ls, verify, reshard, prune"),
        (["prune", ".", "last=0", "dry=perhaps"], "the newest always stays"),
        (["reshard", "source=a"], "'target' is missing; write target=moved"),
        (["ls", "zzz://a"], "zzz://a cannot be opened"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
