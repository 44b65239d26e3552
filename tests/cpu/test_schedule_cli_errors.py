"""``deepseek-schedule``: every kind of wrong argument is explained, all at once, with exit code 2."""

from pathlib import Path

import pytest

from deepseek_train.cli.schedule import main


def test_all_wrong_arguments_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        "name=dualpipe",
        "stage=8",
        "times.forwards=1",
        "times.latency=-1",
        "microbatches=ten",
        "output=pdf",
        "go",
    ]
    assert main(wrong) == 2
    errors = capsys.readouterr().err
    for message in (
        "there is no key 'stage'; did you mean 'stages'?",
        "there is no key 'times.forwards'; did you mean 'times.forward'?",
        "times.latency=-1: not a time; write 0 or more",
        "microbatches=ten: not a whole number or null",
        "output=pdf: write one of text json schedule svg png perfetto",
        "'go' is not of the form key=value",
    ):
        assert f"error: {message}" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=dualpip"], "no schedule is named 'dualpip': did you mean dualpipe?"),
        (["name=zb_v", "stages=1"], "use stages=2"),
        (
            ["name=dualpipe_v", "stages=9"],
            "dualpipe_v puts 2 stages on every rank; use stages=8 or stages=10",
        ),
        (["name=dualpipe", "stages=7"], "got 7: use 6 or 8 ranks, or 1f1b; write stages=6 or stages=8"),
        (["name=dualpipe", "ranks=7"], "got 7: use 6 or 8 ranks, or 1f1b; write ranks=6 or ranks=8"),
        (["name=dualpipe", "stages=7", "microbatches=3"], "write stages=6 or stages=8"),
        (["name=dualpipe", "stages=11"], "got 11: use 10 or 12 ranks, or 1f1b; write stages=10\n"),
        (["name=dualpipe", "stages=1"], "got 1: use 2 ranks, or 1f1b; write stages=2\n"),
        (["name=dualpipe", "microbatches=6"], "got 6 for 8 ranks: use 16 or more"),
        (["name=1f1b", "stages=0"], "stages=0: not a positive number"),
        (["name=1f1b", "stages=4", "ranks=4"], "stages and ranks are both given"),
        (["name=1f1b", "stages_per_rank=2"], "1f1b has 1 on every rank"),
        (["name=1f1b", "max_activations=4"], "max_activations is a limit for name=auto alone"),
        (
            ["name=1f1b", "stages=4", "times.forward=[1,2]"],
            "times.forward lists 2 times for 4 stages: write 4",
        ),
        (["times.forward=[1,x]"], "times.forward=[1,x]: not a number, nor a list like [1,2,1]"),
        (["times.forward=nan"], "times.forward=nan: not a time"),
        (["times.forward=0", "times.backward_input=0", "times.backward_weight=0"], "all times are 0"),
        (["output=json", "path=x"], "output=json is printed: leave path away, or write '> x'"),
        (["output=svg", "path=x.png"], "path=x.png: output=svg is a file that ends in .svg"),
        (["name=all", "output=svg"], "output=svg shows one schedule"),
        (["file=x.schedule", "stages=8"], "stages is in the file x.schedule already"),
        (["file=nowhere"], "nowhere: No such file or directory"),
    ],
)
def test_a_mistake_is_explained_and_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1f1b microbatches=1 stages=0,1\nrank 0: 0F0 0B0\nrank 1: 1B0 1F0\n", "rank 1: 1B0 1F0\n        ^"),
        ("1f1b microbatches=1 stages=0\nrank 0: 0F0 0X0\n", "line 2: '0X0' is no action"),
        ("1f1b microbatches=1 stages=0\nrank 0: 0F0 0B0\n", "times.forward lists 2 times for 1 stages"),
    ],
)
def test_a_file_that_is_no_schedule(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.schedule"
    path.write_text(text)
    assert main([f"file={path}", "times.forward=[1,2]"]) == 2
    assert message in capsys.readouterr().err
