"""``deepseek-data``: every command, every kind of wrong argument."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepseek_train.cli.data import main
from deepseek_train.cli.key_value import UsageError, parse_key_values
from deepseek_train.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.md").write_text(f"Document {number} is about the number {number}.\n" * 5)
    return str(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, texts: str) -> str:
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    arguments = [
        "prepare",
        f"data.path={folder}",
        f"source={texts}",
        "data.validation_percent=20",
        "data.fim_rate=0",
    ]
    assert main(arguments) == 0
    return str(folder)


def test_verify_and_show(prepared: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", prepared]) == 0
    assert "all files are as the manifest says" in capsys.readouterr().out
    assert main(["show", prepared, "3", "sequence_length=20", "split=validation"]) == 0
    first = capsys.readouterr().out
    assert "sample 3 of validation" in first
    assert "about the number" in first
    assert main(["show", prepared, "sequence_length=20", "4", "split=validation"]) == 0
    assert capsys.readouterr().out != first.replace("sample 3", "sample 4")


def test_the_tokenizer_command_writes_the_same_file_twice(tmp_path: Path, texts: str) -> None:
    for name in ("a/one.json", "two.json"):
        assert main(["tokenizer", f"source={texts}", "vocab_size=290", f"output={tmp_path / name}"]) == 0
    assert (tmp_path / "a/one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert load_tokenizer(str(tmp_path / "two.json")).vocab_size == 290
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "two.json"]


def test_all_wrong_arguments_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["prepare", "data.pat=x", "data.max_megabytes=lots", "verbose", "data.fim_rate=0.1", "fim_rate=0"]
        )
        == 2
    )
    errors = capsys.readouterr().err
    for message in (
        "there is no key 'data.pat'; did you mean 'data.path'?",
        "data.max_megabytes=lots: not a whole number or null",
        "'verbose' is not of the form key=value",
        "'data.fim_rate' is given twice",
        "'data.path' is missing",
    ):
        assert f"error: {message}" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepair"], "there is no command 'prepair'; the commands are: prepare verify show tokenizer"),
        (["verify"], "the folder of prepared tokens is missing"),
        (["verify", "a", "b"], "'b' is one argument too many"),
        (["verify", "nowhere"], "there are no prepared tokens here"),
        (["show", "a", "minus"], "'minus' is not the number of a sample"),
        (["show", "a", "split=test", "sequence_length=0"], "sequence_length=0: not a positive number"),
        (["prepare", "data.path=x", "fim_rate=3", "max_megabytes=0"], "data.max_megabytes=0 is neither"),
        (["tokenizer", "output=x", "vocab_size=12"], "use at least 262"),
        (["tokenizer", "output=x", "max_megabytes=0"], "max_megabytes=0: not a positive number"),
    ],
)
def test_a_mistake_is_explained_and_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_damaged_data_exits_with_2_and_names_each_file(
    prepared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in Path(prepared).iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-1] if file.suffix == ".bin" else content)
    assert main(["verify", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "train-00000.bin" in errors
    assert "validation-00000.bin" in errors


def test_it_runs_as_a_module_and_explains_itself() -> None:
    command = [sys.executable, "-m", "deepseek_train.cli.data", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for word in ("prepare", "verify", "show", "tokenizer", "data.fim_rate", "exit codes"):
        assert word in result.stdout


@dataclass(frozen=True)
class Sizes:
    name: str
    width: int = 1
    rate: float = 0.5
    cap: int | None = 7


def test_values_take_the_type_of_their_field() -> None:
    parsed = parse_key_values(Sizes, ["name=a=b", "rate=1e-3", "cap=null"], lambda sizes: [])
    assert parsed == Sizes("a=b", 1, 1e-3, None)


def test_rules_are_told_together_with_wrong_types() -> None:
    with pytest.raises(UsageError) as caught:
        parse_key_values(
            Sizes, ["name=a", "width=1.5", "rate=9"], lambda sizes: [f"rate {sizes.rate} is high"]
        )
    assert caught.value.problems == ("width=1.5: not a whole number", "rate 9.0 is high")
