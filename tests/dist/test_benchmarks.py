"""The bubble benchmark on real ranks: who takes part gives true gradients and sleeps once for each F, I and W."""

from pathlib import Path

import pytest

from benchmarks.bubble import picture, report
from benchmarks.bubble.race import Case, Measured, Plan, race
from benchmarks.bubble.work import ChunkTimes, Sleeper
from deepseek_train.schedule.action import Kind
from tests.harness import run_ranks
from tests.harness.report import RanksFailed

TIMES = ChunkTimes(0.002, 0.002, 0.002)
CASES = (Case("ours", "dualpipe"), Case("ours", "zb_v"), Case("torch", "zb_v"))


@pytest.fixture(scope="module")
def measured() -> list[Measured]:
    found: list[Measured] = run_ranks(race, 2, Plan(CASES, 4, TIMES, rounds=2))[0]
    return found


def test_times_and_counts(measured: list[Measured]) -> None:
    """``race`` itself compares gradients and counts sleeps in every step."""
    assert [(m.case, m.chunks, m.actions) for m in measured] == [
        (CASES[0], 4, 9),
        (CASES[1], 8, 24),
        (CASES[2], 8, 24),
    ]
    for one in measured:
        assert one.ideal is not None
        assert one.ideal_early is not None
        assert one.ideal_early <= one.ideal
        assert len(one.spans) == len(one.slept) == len(one.cpu) == 2
        assert min(one.slept) >= one.chunks * 0.006
        assert all(0 < bubble < 1 for bubble in one.bubbles())


def test_report(measured: list[Measured], tmp_path: Path) -> None:
    bubble = report.Section({"revision": "abc"}, bubble=tuple(report.bubble_row(m, 2.0, 4) for m in measured))
    overhead = report.Section(
        {"revision": "abc"}, overhead=tuple(report.overhead_row(m, 4) for m in measured)
    )
    path = tmp_path / "pipeline_bubble.json"
    report.save(path, bubble, overhead)
    assert report.load(path) == (bubble, overhead)
    assert report.load(tmp_path / "none.json") == (report.Section({}), report.Section({}))
    row = bubble.bubble[1]
    assert row.excess == pytest.approx(row.least - row.ideal)
    assert row.least == min(row.bubbles)
    assert f"| 2 | 4 | zb_v | {row.ideal:.3f} | {row.ideal_early:.3f} | {row.least:.3f} (" in report.markdown(
        bubble, overhead
    )
    assert picture.draw(bubble.bubble, tmp_path / "bubble.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_reached_is_said() -> None:
    def row(who: str, schedule: str, excess: float) -> report.BubbleRow:
        return report.BubbleRow(60.0, 8, schedule, who, 8, 0.1, 0.09, 0.1 + excess, 0.2, excess, ())

    rows = [row("ours", "dualpipe", 0.02), row("ours", "zb_v", 0.01), row("torch", "zb_v", 0.01)]
    assert report.not_reached(rows) == [
        "dualpipe, m=8, 60 ms: excess +0.0200 is above +0.010",
        "zb_v, m=8, 60 ms: excess +0.0100 is not below torch's +0.0100",
    ]
    assert report.not_reached([row("ours", "dualpipe", 0.01), row("torch", "1f1b", 0.1)]) == []


def test_no_sleeping_no_ideal() -> None:
    (one,) = run_ranks(race, 2, Plan((Case("ours", "1f1b"),), 2, None, rounds=1))[0]
    assert one.ideal is None
    assert one.slept == (0.0,)
    assert report.overhead_row(one, 2).cpu_us > 0


def _never(sleeper: Sleeper, kind: Kind) -> None:
    if kind is Kind.FORWARD:
        sleeper.counts[kind] += 1


def _race_with_a_lost_sleep(rank: int, world: int) -> None:
    Sleeper.sleep = _never  # type: ignore[assignment, method-assign]
    race(rank, world, Plan((Case("ours", "1f1b"),), 2, TIMES, rounds=1))


def test_a_lost_sleep_is_an_error() -> None:
    with pytest.raises(RanksFailed, match="ours's 1f1b slept .* where its 2 chunks are one of each"):
        run_ranks(_race_with_a_lost_sleep, 2)
