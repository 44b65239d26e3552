"""The Chrome trace of a timeline: every span and phase once, on its track, nothing overlapping on a track."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.perfetto import to_trace, write_trace
from deepseek_train.schedule.simulate import Durations, simulate
from deepseek_train.schedule.timeline import PhaseSpan, Span, Timeline

SIMULATED = simulate(make_schedule("dualpipe", 8, 20), Durations(1.0, 1.3, 0.7, 2.9))
REAL = Timeline(
    1,
    (
        Span(0, Kind.FORWARD, 1, 3, 7.0, 9.0, paired=True),
        Span(0, Kind.BACKWARD, 1, 0, 7.5, 10.0, paired=True),
    ),
    (
        PhaseSpan(0, Lane.COMPUTE, "attend", Kind.FORWARD, 1, 3, 7.0, 8.0),
        PhaseSpan(0, Lane.COMMUNICATION, "dispatch", Kind.FORWARD, 1, 3, 8.0, 9.0),
        PhaseSpan(0, Lane.COMMUNICATION, "combine", Kind.BACKWARD_INPUT, 1, 0, 7.5, 8.25),
    ),
)


def _slices(timeline: Timeline) -> list[dict[str, Any]]:
    return [event for event in to_trace(timeline)["traceEvents"] if event["ph"] == "X"]


def _threads(timeline: Timeline) -> dict[tuple[int, int], str]:
    names = [e for e in to_trace(timeline)["traceEvents"] if e["name"] == "thread_name"]
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in names}


def test_every_span_is_one_slice_inside_the_step() -> None:
    slices = _slices(SIMULATED)
    spans = Counter((s.rank, f"{s.kind.value} m{s.microbatch} s{s.stage}") for s in SIMULATED.spans)
    assert Counter((event["pid"], event["name"]) for event in slices) == spans
    assert min(event["ts"] for event in slices) == 0
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(SIMULATED.makespan() * 1e6)
    assert sum(event["dur"] for event in slices) == pytest.approx(
        sum(s.end - s.start for s in SIMULATED.spans) * 1e6
    )
    assert set(_threads(SIMULATED).values()) == {"chunks"}


@pytest.mark.parametrize("timeline", [SIMULATED, REAL])
def test_slices_of_one_track_do_not_overlap(timeline: Timeline) -> None:
    threads = _threads(timeline)
    for thread in threads:
        mine = sorted(
            (e["ts"], e["ts"] + e["dur"]) for e in _slices(timeline) if (e["pid"], e["tid"]) == thread
        )
        assert mine
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(mine))


def test_phases_stand_on_their_lanes_from_the_first_start() -> None:
    threads = _threads(REAL)
    placed = {e["name"]: (threads[e["pid"], e["tid"]], e["ts"], e["dur"]) for e in _slices(REAL)}
    assert placed == {
        "F m3 s1": ("chunks", 0.0, 2e6),
        "B m0 s1": ("chunks 2", 0.5e6, 2.5e6),
        "attend F m3 s1": ("compute", 0.0, 1e6),
        "combine I m0 s1": ("communication", 0.5e6, 0.75e6),
        "dispatch F m3 s1": ("communication 2", 1e6, 1e6),
    }


def test_the_file_is_json_with_a_process_for_each_rank(tmp_path: Path) -> None:
    trace = json.loads(write_trace(SIMULATED, tmp_path / "new" / "trace.json", "x").read_text())
    assert trace == to_trace(SIMULATED, "x")
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == [f"rank {rank}" for rank in range(8)]
