"""``deepseek-schedule``: every output, every kind of wrong argument."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_train.cli.schedule import main
from deepseek_train.schedule import catalog
from deepseek_train.schedule.text import from_text, to_text

UNIT = [
    "times.forward=1",
    "times.backward_input=1",
    "times.backward_weight=1",
    "times.overlapped=3",
    "times.latency=0",
]
FIGURE = ["name=dualpipe", "stages=8", "microbatches=20", *UNIT]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(printed(capsys, *arguments, "output=json"))


def test_json_of_the_reports_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys, *FIGURE) == {
        "name": "dualpipe",
        "stages": 8,
        "ranks": 8,
        "microbatches": 20,
        "times": {"forward": 1, "backward_input": 1, "backward_weight": 1, "overlapped": 3, "latency": 0},
        "makespan": 66,
        "bubble": [6] * 8,
        "bubble_fraction": pytest.approx(6 / 66),
        "peak_activations": [9] * 8,
        "peak_weight_queue": [1, 2, 3, 4, 4, 3, 2, 1],
        "formula_bubble": 6,
    }
    assert facts(capsys, "name=DualPipe") == facts(capsys, *FIGURE)  # all of them are defaults


def test_times_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(
        capsys, "name=1f1b", "stages=2", "microbatches=2", "times.forward=[1,2]", "times.latency=0.5"
    )
    assert found["times"]["overlapped"] == [3, 4]
    # rank 1: F 1.5-3.5, B -5.5, F -7.5, B -9.5; rank 0's last backward 10-12
    assert (found["makespan"], found["formula_bubble"]) == (12, None)
    assert found["bubble"] == [6, 4]


def test_equal_ranks_divide_the_times_so_that_the_model_is_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["ranks=2", "microbatches=4", "times.forward=[1,2]"]
    straight, folded = facts(capsys, "name=1f1b", *sizes), facts(capsys, "name=dualpipe-v", *sizes)
    assert (straight["stages"], folded["stages"]) == (2, 4)
    assert straight["times"]["forward"] == [1, 2]
    assert folded["times"]["forward"] == [0.5, 0.5, 1, 1]
    assert folded["times"]["backward_input"] == 0.5
    work = [sum(f["makespan"] - idle for idle in f["bubble"]) for f in (straight, folded)]
    assert work[0] == pytest.approx(work[1])


def test_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = printed(capsys, *FIGURE).splitlines()
    assert lines[1].startswith("rank 0  F0- F1- F2- F3- F4- F5- F6- f10 i10 w10 ")
    assert "[F7&b13----]............[f14&B0----][F8&b14----]" in lines[1]
    assert "[F&B] overlapped pair" in lines[-2]
    assert lines[-1].startswith(
        "dualpipe: 8 stages on 8 ranks, 20 micro-batches: makespan 66, bubble 6 (9.1%, formula 6)"
    )
    monkeypatch.setenv("COLUMNS", "100")
    assert max(map(len, printed(capsys, *FIGURE).splitlines()[:-2])) <= 100


def test_a_printed_schedule_can_be_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["stages=8", "microbatches=8"]
    text = printed(capsys, "name=zb_v", *sizes, "output=schedule")
    assert text == to_text(catalog.make_schedule("zb_v", 4, 8)) == to_text(from_text(text))
    path = tmp_path / "my.schedule"
    path.write_text(text)
    expected = facts(capsys, "name=zb_v", *sizes) | {"formula_bubble": None}
    assert facts(capsys, f"file={path}") == expected


@pytest.mark.parametrize(("output", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("perfetto", b"{")])
def test_files(
    output: str,
    begins: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    suffix = output.replace("perfetto", "json")
    said = printed(capsys, "name=dualpipe", "stages=2", "microbatches=4", f"output={output}")
    assert said.splitlines()[-1] == f"written to dualpipe-2x4.{suffix}"
    assert (tmp_path / f"dualpipe-2x4.{suffix}").read_bytes().startswith(begins)
    printed(capsys, "name=1f1b", "stages=2", "microbatches=2", f"output={output}", f"path=new/x.{suffix}")
    assert (tmp_path / "new" / f"x.{suffix}").read_bytes().startswith(begins)


def test_all_schedules_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "name=all", "stages=8", "microbatches=20").splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1 : 1 + len(catalog.NAMES)]}
    assert tuple(rows) == catalog.NAMES
    assert rows["dualpipe"][1:8] == ["8", "8", "66", "9.1", "6", "6", "9"]
    assert rows["1f1b"][1:] == ["8", "8", "81", "25.9", "21", "21", "1", "-", "8", "0"]
    assert rows["dualpipe_v"][1:3] == ["8", "4"]
    assert "half as many ranks" in lines[-3]
    equal = printed(capsys, "name=all", "ranks=4", "microbatches=16").splitlines()
    rows = {line.split()[0]: line for line in equal[1 : 1 + len(catalog.NAMES)]}
    assert rows["dualpipe_v"].split()[1:3] == ["8", "4"]
    assert "9 x 1/2" in rows["dualpipe_v"]
    assert "same" in equal[-3]


def test_schedules_that_the_sizes_do_not_allow_are_rows_that_say_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["name=all", "stages=7", "microbatches=3"]
    rows = {line.split()[0]: line for line in printed(capsys, *sizes).splitlines()[1:8]}
    assert "stages=7: zb_v puts 2 stages on every rank; use stages=6 or stages=8" in rows["zb_v"]
    assert "needs an even number of pipeline ranks, got 7" in rows["dualpipe"]
    listed = facts(capsys, *sizes)
    assert [each["name"] for each in listed] == list(catalog.NAMES)
    by_name = {each["name"]: each for each in listed}
    assert by_name["1f1b"]["makespan"] == 27
    assert len(by_name["dualpipe"]["problems"]) == 3


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
        (["name=dualpipe", "stages=7"], "needs an even number of pipeline ranks, got 7: use 8"),
        (["name=dualpipe", "microbatches=6"], "got 6 for 8 ranks: use 16 or more"),
        (["name=1f1b", "stages=0"], "stages=0: not a positive number"),
        (["name=1f1b", "stages=4", "ranks=4"], "stages and ranks are both given"),
        (["name=1f1b", "stages_per_rank=2"], "1f1b has 1 on every rank"),
        (["name=1f1b", "memory=4"], "memory is a limit for name=auto alone"),
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


def test_it_runs_as_a_module_and_explains_itself() -> None:
    command = [sys.executable, "-m", "deepseek_train.cli.schedule", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for word in (*catalog.NAMES, "times.overlapped", "formula_bubble", "perfetto", "exit codes"):
        assert word in result.stdout
