import json
import math
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_train.monitor.jsonl import History, JsonlSink, keeps_load, read_history
from deepseek_train.monitor.metrics import EvalMetrics
from tests.cpu.monitor_samples import STEP, make_history, make_timeline


def write(path: Path, history: History, start_step: int = 0, until: int = 10**9) -> None:
    sink = JsonlSink(path, start_step)
    evaluations = {e.step: e for e in history.evaluations}
    for step in history.steps:
        if start_step < step.step <= until:
            sink.step(step)
            if step.step in evaluations:
                sink.evaluation(evaluations[step.step])
    sink.close()


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    history = make_history(steps=60)
    write(tmp_path / "run" / "metrics.jsonl", history)
    assert read_history(tmp_path / "run" / "metrics.jsonl") == history


def test_every_line_is_strict_json_with_its_kind_and_is_there_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.step(replace(STEP, loss=math.nan, grad_norm=math.inf, skipped=True, timeline=make_timeline(2, 4)))
    sink.evaluation(EvalMetrics(120, 1_966_080, 3.3, None, 65_536))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # the sink is still open
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    sink.close()
    assert (first["kind"], second["kind"]) == ("step", "validation")
    assert first["loss"] is None
    assert first["load_max_over_mean"] == 1.5
    assert first["max_violation"] == {"1": 0.5, "2": 0.0}
    assert "timeline" not in first
    read = read_history(tmp_path / "metrics.jsonl").steps[0]
    assert math.isnan(read.loss)
    assert math.isnan(read.grad_norm)
    assert read.skipped


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    abandoned, taken = make_history(steps=60, eval_every=10), make_history(steps=80, eval_every=10, seed=1)
    write(path, abandoned)
    write(path, taken, start_step=40)
    read = read_history(path)
    assert read.steps == abandoned.steps[:40] + taken.steps[40:]
    assert read.evaluations == abandoned.evaluations[:4] + taken.evaluations[4:]
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_goes_back_is_told_as_one_history(tmp_path: Path) -> None:
    path, history = tmp_path / "metrics.jsonl", make_history(steps=30)
    sink = JsonlSink(path)
    for metrics in [*history.steps[:20], *history.steps[10:]]:
        if metrics.step == 11:
            sink.rewind(10)
        sink.step(metrics)
    sink.close()
    assert read_history(path).steps == history.steps


def test_a_new_run_does_not_continue_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_history(steps=20))
    write(path, make_history(steps=5, seed=1))
    assert read_history(path) == make_history(steps=5, seed=1)


@pytest.mark.parametrize("cut", [1, 2, 40, 150])
def test_a_torn_last_line_is_left_out_and_does_not_spoil_a_resume(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    history = make_history(steps=30, eval_every=100)
    write(path, history, until=21)
    path.write_bytes(path.read_bytes()[:-cut])
    whole = 21 if cut == 1 else 20  # one byte is only the newline
    assert read_history(path).steps == history.steps[:whole]
    write(path, history, start_step=20)
    assert read_history(path) == history


def test_damage_elsewhere_is_an_error_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_history(steps=3))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "oops", lines[2]]))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_history(path)


def test_long_runs_keep_fewer_loads_but_always_the_summary(tmp_path: Path) -> None:
    assert [s for s in (1, 999, 1000, 1001, 1010, 10_010, 10_100) if keeps_load(s)] == [
        1,
        999,
        1000,
        1010,
        10_100,
    ]
    assert sum(keeps_load(step) for step in range(1, 100_000)) == 999 + 900 + 900
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.step(replace(STEP, step=1001))
    sink.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["expert_load"], record["load_max_over_mean"]) == ({}, 1.5)
    assert record["max_violation"] == {"1": 0.5, "2": 0.0}


def test_a_file_from_before_max_violation_was_written_is_read_and_continued(tmp_path: Path) -> None:
    path, history = tmp_path / "metrics.jsonl", make_history(steps=20)
    write(path, history, until=12)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["max_violation"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    write(path, history, start_step=10)
    assert read_history(path) == history


def test_a_full_disk_keeps_lines_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a limit on the size of files, which tears a line as a full disk may."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.step(replace(STEP, step=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        sink.step(replace(STEP, step=2))
        sink.step(replace(STEP, step=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [one.step for one in read_history(path).steps] == [1]
    assert capsys.readouterr().out.count(f"WARNING: {path} cannot be written, lines wait in memory") == 1
    sink.step(replace(STEP, step=4))
    sink.close()
    assert [one.step for one in read_history(path).steps] == [1, 2, 3, 4]
