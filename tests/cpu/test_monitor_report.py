import json
import re
import time
from dataclasses import replace
from pathlib import Path

from deepseek_train.monitor.jsonl import History
from deepseek_train.monitor.machine import MachineFacts
from deepseek_train.monitor.report import ReportFacts, Sample, write_report
from deepseek_train.schedule.timeline import Timeline
from tests.cpu.monitor_samples import make_history, make_timeline, with_phases

FACTS = ReportFacts(
    name="pocket",
    history=make_history(300),
    total_tokens=300 * 16_384,
    total_parameters=12_345_678,
    active_parameters=3_456_789,
    layout="4 ranks: PP 4 x DP 1, EP 1, schedule dualpipe",
    config_yaml="name: pocket\nmodel:\n  hidden_size: 64\n",
    machine=MachineFacts("A | B CPU", 8, 2**35, ("H200", "H200"), "Linux", (("torch", "2.13"),), "abc123"),
    wall_seconds=512.3,
    timeline=make_timeline(4, 12, side_by_side=True),
    timeline_step=120,
    sample=Sample("def add(a, b):", "\n```\n    return a + b\n"),
)


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_a_finished_run_has_every_section_and_its_pictures_quickly(tmp_path: Path) -> None:
    began = time.perf_counter()
    path = write_report(tmp_path, FACTS)
    assert time.perf_counter() - began < 3 * 3  # 1.3 s alone; the machine may be busy
    assert path == tmp_path / "report.md"
    text = path.read_text()
    assert headings(text) == ["Loss", "Expert load", "Pipeline of step 120", "Sample", "Settings", "Machine"]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(pictures) == sorted(f"report/{p.name}" for p in (tmp_path / "report").iterdir())
    assert len(pictures) == 4


def test_phases_add_their_lanes_and_a_trace(tmp_path: Path) -> None:
    assert FACTS.timeline is not None
    timeline = with_phases(FACTS.timeline)
    text = write_report(tmp_path, replace(FACTS, timeline=timeline)).read_text()
    assert "](report/lanes.png)" in text
    assert "[trace.json](report/trace.json)" in text
    exposed = max(timeline.exposed_communication(rank) for rank in range(timeline.num_ranks))
    assert f"hid, in the whole step: {1000 * exposed:.3g}ms on the worst rank" in text
    slices = [
        e for e in json.loads((tmp_path / "report/trace.json").read_text())["traceEvents"] if e["ph"] == "X"
    ]
    assert len(slices) == len(timeline.spans) + len(timeline.phases)
    assert (tmp_path / "report/lanes.png").exists()


def test_headline_figures(tmp_path: Path) -> None:
    text = write_report(tmp_path, FACTS).read_text()
    assert FACTS.timeline is not None
    last = FACTS.history.steps[-20:]
    for expected in (
        "12.3M, 3.46M active per token",
        "4.92M tokens in 300 steps (all of what was asked for)",
        f"{sum(s.loss for s in last) / 20:.4f} (mean of the last 20 steps)",
        f"**{FACTS.history.evaluations[-1].loss:.4f}** after step 300",
        "8m32s",
        "| skipped steps | **1** (a gradient was not finite) |",
        f"ranks were idle {100 * FACTS.timeline.bubble_fraction():.1f}%",
        "| CPU | A \\| B CPU, 8 cores |",
        "| GPUs | 2 x H200 |",
        "`abc123`",
        "| layer | MaxVio, first tenth | middle tenth | last tenth | busiest expert | idlest expert |",
        "```yaml\nname: pocket\nmodel:\n  hidden_size: 64\n```",
    ):
        assert expected in text, expected


def test_speed_counts_operations_where_it_can(tmp_path: Path) -> None:
    steps = tuple(replace(s, tflops=400.0 + s.step % 3, mfu=0.41) for s in FACTS.history.steps)
    text = write_report(tmp_path, replace(FACTS, history=replace(FACTS.history, steps=steps))).read_text()
    assert "tokens/s (median step), 401 TFLOP/s a rank (causal count), MFU 41.0% |" in text
    assert "TFLOP/s" not in write_report(tmp_path, FACTS).read_text()


def test_a_sample_with_backticks_stays_inside_its_fence(tmp_path: Path) -> None:
    text = write_report(tmp_path, FACTS).read_text()
    assert "````text\n\n```\n    return a + b\n\n````" in text


def test_half_a_run_says_how_far_it_came(tmp_path: Path) -> None:
    history = History(FACTS.history.steps[:75], ())
    text = write_report(tmp_path, replace(FACTS, history=history, timeline=None, sample=None)).read_text()
    assert "1.23M tokens in 75 steps (25.0% of what was asked for)" in text
    assert "validation" not in text
    assert headings(text) == ["Loss", "Expert load", "Settings", "Machine"]


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    steps = tuple(replace(step, expert_load={}, mtp_loss=None) for step in FACTS.history.steps[:3])
    dense = replace(FACTS, history=History(steps, ()), timeline=Timeline(2, ()))
    assert headings(write_report(tmp_path, dense).read_text()) == ["Loss", "Sample", "Settings", "Machine"]
    nothing = replace(FACTS, history=History((), ()), timeline=None, sample=None)
    text = write_report(tmp_path / "not" / "there", nothing).read_text()
    assert headings(text) == ["Settings", "Machine"]
    assert "12.3M" in text


def test_the_validation_table_ends_with_the_last_one_however_many(tmp_path: Path) -> None:
    history = make_history(300, eval_every=7)
    assert len(history.evaluations) == 42
    text = write_report(tmp_path, replace(FACTS, history=history)).read_text()
    rows = re.findall(r"^\| (\d+) \|", text.partition("## Expert load")[0], re.MULTILINE)
    assert len(rows) <= 20
    assert rows[-1] == "294"
    assert rows == sorted(rows, key=int)
