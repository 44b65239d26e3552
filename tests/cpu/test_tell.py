"""What is wrong at the start is told once on every node, whoever has it."""

import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_train.cli.tell import tell

CODE = "import sys; from deepseek_train.cli.tell import tell; tell(sys.argv[1])"


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, text: str) -> str:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank % 4))
    tell(text)
    return capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["torchrun", "our own"])
def test_each_text_once_and_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    if launcher == "torchrun":
        (tmp_path / "attempt_0" / "5").mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "5" / "error.json"))
    else:
        monkeypatch.setenv("DEEPSEEK_TRAIN_STORE", str(tmp_path / "store"))
    assert told(monkeypatch, capsys, 4, "all have this") == "all have this\n"
    assert told(monkeypatch, capsys, 5, "all have this") == ""
    assert told(monkeypatch, capsys, 6, "a disk is away") == "rank 6 and perhaps others: a disk is away\n"
    assert told(monkeypatch, capsys, 7, "a disk is away") == ""
    assert told(monkeypatch, capsys, 5, "rank 5 waited") == "rank 5 waited\n"
    assert told(monkeypatch, capsys, 6, "rank 6 waited") == ""


def test_ranks_without_a_launcher_all_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("TORCHELASTIC_ERROR_FILE", "DEEPSEEK_TRAIN_STORE"):
        monkeypatch.delenv(variable, raising=False)
    assert told(monkeypatch, capsys, 1, "wrong") == "rank 1 and perhaps others: wrong\n"
    assert told(monkeypatch, capsys, 0, "wrong") == "wrong\n"
    monkeypatch.setenv("DEEPSEEK_TRAIN_STORE", str(tmp_path / "gone" / "store"))
    assert told(monkeypatch, capsys, 0, "wrong") == "wrong\n"


def test_of_ranks_at_once_one_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_TRAIN_STORE", str(tmp_path / "store"))
    ranks = [
        subprocess.Popen([sys.executable, "-c", CODE, "full"], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert sum(rank.communicate()[1].count("full") for rank in ranks) == 1
