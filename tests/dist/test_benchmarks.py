"""Benchmarks on real ranks. The bubble: who takes part gives true gradients and sleeps once for each F, I and W. The
overlap of the real block: what is hidden by what, and by whom hops are started.
"""

import json
from pathlib import Path

import pytest

from benchmarks import comm_overlap
from benchmarks.bubble import picture, report
from benchmarks.bubble.race import Case, Measured, Plan, race
from benchmarks.bubble.work import ChunkTimes, Sleeper
from benchmarks.cluster import available
from benchmarks.overlap.block import ORDERS, Work
from benchmarks.overlap.block_race import Leg, block_sample, race_block
from benchmarks.overlap.paper import predict_block
from benchmarks.overlap.race import Report, Sample
from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.timeline import PhaseSpan
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


WORK = Work(nodes=2, ranks_per_node=2, layers=1, tokens=16, hidden=128, stretch=0.25, pairs=1, rounds=1)
F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def test_the_real_block_computes_for_its_set_time_and_the_network_starts_second_hops() -> None:
    """``race_block`` itself compares losses."""
    told = run_ranks(race_block, WORK.ranks, WORK)
    for one in told:
        assert list(one.samples) == list(ORDERS)
        assert 0 < one.worked < 1
        for ((sample,),) in one.samples.values():
            assert sample.pair.compute >= WORK.compute
            assert sample.pair.wall > sample.pair.compute
            assert 0 < sample.announce < sample.transfers
            assert sample.second_hops == 4  # dispatch and combine, forward and backward
    # A hop that is over before anybody waits for it hands on at once, in the thread that started it.
    assert sum(s.by_network for one in told for ((s,),) in one.samples.values()) > 0


def test_the_real_block_over_shaped_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = "--block-layers 1 --tokens 64 --hidden 128 --block-stretch 1 --block-pairs 1 --block-rounds 1"
    command = [
        "comm_overlap",
        "--only",
        "block",
        "--block-ratios",
        "1",
        *work.split(),
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", command)
    comm_overlap.main()
    if (reason := available()) is not None:
        assert "can be none here" in capsys.readouterr().out, reason
        assert list(tmp_path.iterdir()) == []
        return
    results = json.loads((tmp_path / "comm_overlap_block.json").read_text())["results"]
    assert [one["order"] for one in results] == list(ORDERS)
    for one in results:
        assert one["exposed_ms"] <= one["transfers_ms"]
        assert one["transfers_ms"] > one["announce_ms"] >= one["announce_exposed_ms"]
    assert "| 1.00 | in sequence |" in (tmp_path / "comm_overlap_block.md").read_text()
    assert (tmp_path / "comm_overlap_block.png").read_bytes().startswith(b"\x89PNG")


def test_what_hides_what() -> None:
    def phase(lane: Lane, name: str, kind: Kind, start: float, end: float) -> PhaseSpan:
        return PhaseSpan(0, lane, name, kind, 0, 0, start, end)

    phases = [
        phase(Lane.COMMUNICATION, "announce", F, 1.0, 3.0),
        phase(Lane.COMPUTE, "attend", W, 2.0, 3.0),
        phase(Lane.COMMUNICATION, "dispatch", F, 3.0, 8.0),
        phase(Lane.COMPUTE, "shared", F, 3.5, 4.0),
        phase(Lane.COMPUTE, "shared", W, 5.0, 6.5),
    ]
    legs = [
        Leg(at=100 + at, second=second, by_network=by_network)
        for at, second, by_network in (
            (3.0, False, False),
            (5.5, True, True),
            (7.0, True, False),
            (11.0, True, True),
        )
    ]
    pair = Sample(10.0, 3.0, 4.0)
    found = block_sample(Report(100.0, [], phases), legs, pair, 0.0, 10.0)
    assert (found.transfers, found.announce, found.announce_exposed) == (7.0, 2.0, 1.0)
    assert found.announced == ((101.0, 103.0),)
    assert (found.hidden_by_shared, found.hidden_by_weights) == (0.5, 2.5)
    assert (found.second_hops, found.by_network, found.while_computing) == (2, 1, 1)


def test_the_real_block_on_paper() -> None:
    transfers = WORK.transfers(0.5)
    assert sum(transfers.values()) == pytest.approx(0.5 * WORK.compute)
    nothing = dict.fromkeys(transfers, 0.0)
    for order in ORDERS.values():
        assert predict_block(3, WORK.times, nothing, order).wall == pytest.approx(3 * WORK.compute)
    alone = nothing | {
        ("announce", F): 1.0,
        ("combine", I): 2.0,
    }  # seconds: far more than anything could hide
    told = predict_block(1, WORK.times, alone, None)
    assert told.wall == pytest.approx(WORK.compute + 3.0)
    # The shared expert hides its own time of a dispatch, and of the dispatch's gradients with the experts' weights'.
    beside = nothing | {("dispatch", F): 1.0, ("dispatch", I): 1.0}
    hidden = sum(WORK.times[key] for key in (("shared", F), ("shared", I), ("shared", W), ("experts", W)))
    assert predict_block(1, WORK.times, beside, None).wall == pytest.approx(WORK.compute + 2.0 - hidden)
    # Routers first: what they have decided travels under the attention's weight gradients, but for the first layer,
    # beside which the backward half has none yet.
    decided = nothing | {("announce", F): WORK.times["attend", W]}
    printed, first = (predict_block(3, WORK.times, decided, ORDERS[name]) for name in list(ORDERS)[:2])
    assert first.wall - first.compute == pytest.approx(WORK.times["attend", W])
    assert printed.wall - printed.compute == pytest.approx(3 * WORK.times["attend", W])
