"""``deepseek-schedule``: every output, every kind of schedule."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_train.cli.schedule import main
from deepseek_train.schedule import catalog
from deepseek_train.schedule.measured import durations_to_json
from deepseek_train.schedule.simulate import Durations
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
    rows = {line.split()[0]: line.split() for line in lines[4 : 4 + len(catalog.NAMES)]}
    assert tuple(rows) == catalog.NAMES
    assert rows["dualpipe"][1:8] == ["8", "8", "66", "9.1", "6", "6", "9"]
    assert rows["1f1b"][1:] == ["8", "8", "81", "25.9", "21", "21", "1", "-", "8", "0"]
    assert rows["dualpipe_v"][1:3] == ["8", "4"]
    assert "half as many ranks" in lines[0]
    equal = printed(capsys, "name=all", "ranks=4", "microbatches=16").splitlines()
    folded = next(line for line in equal if line.startswith("dualpipe_v"))
    assert folded.split()[1:3] == ["8", "4"]
    assert "9 x 1/2" in folded
    assert "same" in equal[0]


def test_schedules_that_the_sizes_do_not_allow_are_rows_that_say_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["name=all", "stages=7", "microbatches=3"]
    rows = {line.split()[0]: line for line in printed(capsys, *sizes).splitlines()[4:11]}
    assert "stages=7: zb_v puts 2 stages on every rank; use stages=6 or stages=8" in rows["zb_v"]
    assert "needs an even number of pipeline ranks, got 7" in rows["dualpipe"]
    listed = facts(capsys, *sizes)
    assert [each["name"] for each in listed] == list(catalog.NAMES)
    by_name = {each["name"]: each for each in listed}
    assert by_name["1f1b"]["makespan"] == 27
    assert len(by_name["dualpipe"]["problems"]) == 3


def test_a_search_keeps_its_limit_and_loses_to_no_schedule_of_the_report(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["stages=2", "microbatches=4", "times.forward=[1,2]"]
    found, dualpipe = facts(capsys, "name=auto", *sizes), facts(capsys, "name=dualpipe", *sizes)
    assert (found["name"], found["stages"], found["formula_bubble"]) == ("auto", 2, None)
    assert found["makespan"] <= dualpipe["makespan"]
    tight = facts(capsys, "name=auto", "max_activations=1", *sizes)
    assert max(tight["peak_activations"]) <= 1 < max(found["peak_activations"])
    assert tight["makespan"] > found["makespan"]


def test_a_file_of_measured_times_says_how_many_stages_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "durations.json"
    path.write_text(durations_to_json(Durations((1.0, 2.0), 1.0, 1.0, 3.0)))
    assert facts(capsys, "name=1f1b", f"measured={path}")["stages"] == 2
    assert facts(capsys, "name=zb_v", f"measured={path}")["ranks"] == 1
    assert facts(capsys, "name=1f1b", "ranks=2", f"measured={path}")["times"]["forward"] == [1, 2]
    assert main(["name=1f1b", "stages=4", f"measured={path}"]) == 2
    assert "times.forward lists 2 times for 4 stages" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [
        sys.executable,
        "-m",
        "deepseek_train.cli.schedule",
        "name=1f1b",
        "microbatches=99",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_it_runs_as_a_module_and_explains_itself() -> None:
    command = [sys.executable, "-m", "deepseek_train.cli.schedule", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for word in (*catalog.NAMES, "times.overlapped", "formula_bubble", "perfetto", "exit codes"):
        assert word in result.stdout
