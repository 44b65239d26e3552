"""Bytes sent for experts: written, read back, logged and reported."""

from dataclasses import replace
from pathlib import Path

from deepseek_train.monitor.jsonl import JsonlSink, read_history
from deepseek_train.monitor.report_traffic import traffic_section
from deepseek_train.monitor.wandb_sink import WandbSink
from deepseek_train.spec.links import ExpertTraffic, LinkBytes
from tests.cpu.monitor_samples import STEP
from tests.cpu.test_monitor_wandb import FakeRun

SENT = ExpertTraffic(
    LinkBytes(1, 2, 3), LinkBytes(100, 200, 3_000_000), LinkBytes(7, 8, 6_000_000), 6_000_000
)
COUNTED = replace(STEP, expert_traffic=SENT)
ONE_NODE = replace(
    STEP, expert_traffic=replace(SENT, dispatch=LinkBytes(1, 2), combine=LinkBytes(3, 4), least_cross=0)
)


def test_counts_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    steps = COUNTED, replace(STEP, step=121), replace(ONE_NODE, step=122)
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in steps:
        sink.step(step)
    sink.close()
    assert read_history(tmp_path / "metrics.jsonl").steps == steps


def test_numbers_in_a_row_are_the_counts_again() -> None:
    assert ExpertTraffic.of(SENT.numbers()) == SENT
    assert SENT.over_least() == 1.5


def test_what_is_not_known_is_not_logged() -> None:
    run = FakeRun()
    sink = WandbSink(run)
    for step in (COUNTED, STEP, ONE_NODE):
        sink.step(step)
    counted, unknown, one_node = run.logged
    assert counted["expert_bytes/dispatch_cross"] == 3_000_000
    assert counted["expert_bytes/plan_node"] == 2
    assert counted["expert_bytes/cross_over_least"] == 1.5
    assert not [name for name in unknown if name.startswith("expert_bytes")]
    assert "expert_bytes/cross_over_least" not in one_node


def test_the_report_says_how_much_and_how_near_the_least() -> None:
    title, words, numbers = traffic_section([COUNTED])
    assert title == "## Expert traffic"
    assert "1.500 times the least possible" in words
    assert "dispatch" in numbers
    assert "least possible" not in traffic_section([ONE_NODE])[1]
    assert traffic_section([STEP]) == traffic_section([]) == []
