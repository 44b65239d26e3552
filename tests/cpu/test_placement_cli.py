"""``deepseek-placement``: text, JSON and every kind of mistake."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_train.cli.placement import main
from deepseek_train.monitor.jsonl import JsonlSink
from deepseek_train.parallel.expert.placement import place_experts
from tests.cpu.monitor_samples import STEP

FITS = ["gpus=4", "nodes=2", "redundant=4"]
EARLY, LATE = (100, 1, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 40, 1, 1, 2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 12 steps: layer 1 changes its favourite after step 10, layer 3 is even."""
    folder = tmp_path / "runs" / "tiny"
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in range(1, 13):
        load = {3: (5,) * 8, 1: EARLY if step <= 10 else LATE}
        sink.step(replace(STEP, step=step, expert_load=load))
    sink.close()
    (folder / "config.yaml").write_text("model:\n  num_expert_groups: 4\n")
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def errors(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *told, last = captured.err.splitlines()
    assert last == "'deepseek-placement --help' shows what can be written."
    assert all(line.startswith("error: ") for line in told)
    return [line.removeprefix("error: ") for line in told]


def test_text_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, f"run={run}", *FITS, "steps=2").splitlines()
    # Layer 1, of a step: groups have 2 2 41 3, so GPU 2 has 41 before, and 12 would be even. Node 0 takes groups 2
    # and 1 (1 1 40 1: expert 4 three times), its GPUs 13.3 + 13.3 + 1 and 13.3 + 1 + 1. Node 1: 7 is halved, then 0.
    assert lines[:4] == [
        f"load: steps 11 to 12 of {run} (2 with loads)",
        "8 experts + 4 redundant on 4 GPUs: 3 on each. Nodes: 2. Groups: 4, each on one node.",
        "",
        "layer  before   after  copied experts",
    ]
    assert lines[4:8] == [
        "    1   3.417   2.306  4 x3, 0, 7",
        "    3   1.000   1.000  0, 1, 2, 3",
        " mean   2.208   1.653",
        "worst   3.417   2.306",
    ]


def test_json_holds_the_maps_of_the_summed_loads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, f"run={run}", *FITS, "output=json"))  # steps: 100, so all
    total_E = [10 * early + 2 * late for early, late in zip(EARLY, LATE, strict=True)]
    wanted = place_experts([total_E, [60] * 8], replicas=12, groups=4, nodes=2, gpus=4)
    sizes = {key: found[key] for key in ("gpus", "nodes", "groups", "redundant", "grouped")}
    assert sizes == {"gpus": 4, "nodes": 2, "groups": 4, "redundant": 4, "grouped": True}
    assert [layer["layer"] for layer in found["layers"]] == [1, 3]
    for row, layer in enumerate(found["layers"]):
        assert layer["max_over_mean_before"] == wanted.max_over_mean_before()[row]
        assert layer["max_over_mean_after"] == wanted.max_over_mean_after()[row]
        assert layer["copies"] == list(wanted.copies_LE[row])
        assert layer["physical_to_logical"] == list(wanted.physical_to_logical_LP[row])
        assert layer["logical_to_physical"] == [list(c) for c in wanted.logical_to_physical_LEC[row]]


def test_groups_are_what_is_written_else_the_runs_else_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "load.json"
    file.write_text(json.dumps({"10": [9.5, 1, 1, 1], "9": [1, 1, 1, 1]}))

    def found(*arguments: str) -> Any:
        return json.loads(printed(capsys, *arguments, "gpus=2", "nodes=2", "output=json"))

    assert found(f"run={run}")["groups"] == 4
    assert found(f"run={run}", "groups=2")["groups"] == 2
    of_file = found(f"load={file}")
    assert (of_file["groups"], of_file["grouped"]) == (1, False)
    assert [layer["layer"] for layer in of_file["layers"]] == [9, 10]
    assert found(f"load={file}", "groups=2")["grouped"]


def test_text_of_a_file_whose_groups_are_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "load.json"
    file.write_text('{"3": [8, 1, 1, 2]}')
    lines = printed(capsys, f"load={file}", "gpus=2", "nodes=2").splitlines()
    assert lines[0] == f"load: {file}"
    assert lines[1].endswith("Nodes: 2. Groups: 1, spread: 2 nodes do not divide them.")
    assert lines[4] == "    3   1.500   1.500"


def test_v3_prefill_as_the_help_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "load.json"
    file.write_text(json.dumps({"3": [1000 // (1 + e * 37 % 256) + 1 for e in range(256)]}))
    sizes = ["groups=8", "gpus=32", "nodes=4", "redundant=32", "output=json"]
    layer = json.loads(printed(capsys, f"load={file}", *sizes))["layers"][0]
    assert len(layer["physical_to_logical"]) == 32 * 9
    assert layer["max_over_mean_after"] < layer["max_over_mean_before"] / 2


def test_all_mistakes_are_told_at_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["nods=2", "output=xml", "gpus=6", "nodes=4", "groups=3", "redundant=3", "redundant=4"]
    assert errors(capsys, f"run={run}", *arguments) == [
        "there is no key 'nods'; did you mean 'nodes'?",
        "'redundant' is given twice",
        "output=xml: write one of text json",
        "groups=3: 8 experts are no 3 groups of one size; write groups=2 or groups=4",
        "gpus=6: 4 nodes do not hold equally many of them; write gpus=4 or gpus=8",
        "replicas=11: 11 = 8 experts + 3 redundant are not equally many on each of 6 GPUs; write redundant=4",
    ]


def test_mistakes_beside_loads_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere"
    assert errors(capsys, f"run={nowhere}", "gpus=3", "nodes=2", "redundant=-1", "steps=0") == [
        "steps=0: write 1 or more",
        "redundant=-1: write 0 or more",
        f"run={nowhere}: metrics.jsonl: No such file or directory; write the folder of a run, as run=runs/tiny, "
        "or load=FILE.json",
        f"run={nowhere}: config.yaml: No such file or directory; write it as groups=8",
        "gpus=3: 2 nodes do not hold equally many of them; write gpus=2 or gpus=4",
    ]


def test_what_must_be_written_and_what_excludes_itself(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors(capsys, "nodes=2") == [
        "nothing says the loads: write run=FOLDER, as run=runs/tiny, or load=FILE.json",
        "gpus: say how many hold the experts, as gpus=32",
    ]
    file = tmp_path / "load.json"
    file.write_text('{"1": [1, 2]}')
    assert errors(capsys, f"run={run}", f"load={file}", "gpus=2", "steps=3", "groups=1") == [
        "run and load are both given: write one of them",
        "steps are those of a run: leave steps=.. away with load=..",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[[1, 2]]", 'not an object of layers; write {"3": [tokens of each expert], "4": [..]}'),
        ('{"first": [1, 2]}', "'first' is no number of a layer"),
        ('{"1": 7}', "layer 1 is not a list of numbers"),
        ('{"1": [1, true]}', "layer 1 is not a list of numbers"),
        ("{}", "load has no layers"),
        ('{"1": []}', "load of layer 1 is empty"),
        ('{"1": [1, 2], "2": [1]}', "load of layer 2 lists 1 experts: layer 1 has 2"),
        (
            '{"7": [1, -2]}',
            "load of layer 7: expert 1 has -2; tokens are counted: write numbers of 0 or more",
        ),
        ('{"7": [1, NaN]}', "load of layer 7: expert 1 has nan"),
        ('{"7": [1, 1e999]}', "load of layer 7: expert 1 has inf"),
    ],
)
def test_a_file_that_holds_no_loads(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "load.json"
    file.write_text(text)
    told = errors(capsys, f"load={file}", "gpus=2", "nodes=3")
    assert str(file) in told[0]
    assert message in told[0]
    assert told[1:] == ["gpus=2: 3 nodes do not hold equally many of them; write gpus=3"]


def test_a_run_without_loads_where_they_are_looked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = JsonlSink(run / "metrics.jsonl", start_step=12)
    sink.step(replace(STEP, step=1003))  # not one of those whose loads are kept
    sink.close()
    assert errors(capsys, f"run={run}", *FITS) == [
        f"steps=100: run={run} kept no loads of its last 100 steps; write steps=992 or more"
    ]
    assert "load: step 12 of" in printed(capsys, f"run={run}", *FITS, "steps=992")
    dense = tmp_path / "dense"
    sink = JsonlSink(dense / "metrics.jsonl")
    sink.step(replace(STEP, step=1, expert_load={}))
    sink.close()
    assert errors(capsys, f"run={dense}", "groups=1", *FITS) == [
        f"run={dense}: none of the 1 steps in metrics.jsonl has expert loads; "
        "take a run of a model with MoE layers, or load=FILE.json"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}", "config.yaml has no model.num_expert_groups"),
        ("- 1", "config.yaml has no model.num_expert_groups"),
        ("model: {num_expert_groups: [", "config.yaml has no model.num_expert_groups"),
        ("model: {num_expert_groups: many}", "config.yaml: model.num_expert_groups is 'many'"),
    ],
)
def test_a_run_that_does_not_say_its_groups(
    text: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_text(text)
    told = errors(capsys, f"run={run}", *FITS)
    assert len(told) == 1
    assert message in told[0]
    assert told[0].endswith("; write it as groups=8")


def test_a_history_that_is_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text('{"kind":"step","speed":1}\n')
    assert f"run={run}: metrics.jsonl is not what a run writes" in errors(capsys, f"run={run}", *FITS)[0]


def test_help_and_the_program_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: deepseek-placement" in printed(capsys, "--help")
    command = [sys.executable, "-m", "deepseek_train.cli.placement", "gpus=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: gpus=x: not a whole number or null" in done.stderr
