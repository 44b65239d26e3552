"""Timelines as text: what stands where."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Kind, Schedule
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.render import render
from deepseek_train.schedule.rows import stack, tones
from deepseek_train.schedule.simulate import Durations, simulate
from deepseek_train.schedule.timeline import Span, Timeline
from tests.paper.schedules import training_schedules

EQUAL = Durations(1.0, 1.0, 1.0, 3.0)


def test_a_drawing_letter_for_letter() -> None:
    drawn = render(simulate(make_schedule("dualpipe", 2, 4), EQUAL))
    assert drawn.splitlines() == [
        "time    0              5              10",
        "rank 0  F0 f2 F1 b2--- [f3&B0--]b3--- I1 W1 ",
        "rank 1  f2 F0 f3 B0--- [F1&b2--]B1--- i3 w3 ",
    ]


def test_idle_time_is_dots_on_the_grid() -> None:
    first, last = render(simulate(make_schedule("1f1b", 2, 3), EQUAL)).splitlines()[1:]
    assert first == "rank 0  F0 F1 ......B0--- F2 B1--- ...B2--- "
    assert last == "rank 1  ...F0 B0--- F1 B1--- F2 B2--- ......"


def test_a_narrow_terminal_gets_parts_that_make_the_whole() -> None:
    timeline = simulate(make_schedule("dualpipe", 4, 8), EQUAL)
    whole = render(timeline).splitlines()
    parts = [part.splitlines() for part in render(timeline, columns=50).split("\n\n")]
    assert all(len(line) <= 50 for part in parts for line in part)
    for number in range(1, 5):
        assert "".join(part[number][8:] for part in parts) == whole[number][8:]


def test_colours_change_no_letter() -> None:
    timeline = simulate(make_schedule("dualpipe", 4, 8), EQUAL)
    painted = render(timeline, colour=True)
    assert len(set(re.findall(r"\x1b\[(48[\d;]*)m", painted))) == 8  # 4 kinds, 2 directions
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == render(timeline)


def test_a_pair_that_ran_at_once_and_a_late_start() -> None:
    halves = (
        Span(0, Kind.FORWARD, 0, 1, 100.0, 102.0, paired=True),
        Span(0, Kind.BACKWARD, 0, 0, 100.5, 103.0, paired=True),
    )
    assert render(Timeline(1, halves)).splitlines()[1] == "rank 0  [F1&B0]"


@settings(max_examples=40, deadline=None)
@given(training_schedules(), st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4))
def test_any_times_are_drawn_in_rows_of_one_length(schedule: Schedule, times: list[float]) -> None:
    rows = render(simulate(schedule, Durations(*times))).splitlines()[1:]
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == schedule.placement.num_ranks


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e4])
def test_the_unit_of_time_changes_only_the_axis(unit: float) -> None:
    timeline = simulate(make_schedule("dualpipe", 4, 8), Durations(1.0, 1.3, 0.7, 3.0))
    scaled = tuple(replace(s, start=s.start * unit, end=s.end * unit) for s in timeline.spans)
    assert render(Timeline(4, scaled)).splitlines()[1:] == render(timeline).splitlines()[1:]


def test_the_second_stage_of_a_rank_is_told_from_the_first() -> None:
    timeline = simulate(make_schedule("dualpipe_v", 2, 4), EQUAL)
    assert tones(timeline).names == ("first stage of the rank", "second stage")
    assert {(s.rank, s.stage): tones(timeline).is_second(s) for s in timeline.spans} == {
        (0, 0): False,
        (1, 1): False,
        (1, 2): True,
        (0, 3): True,
    }
    assert not tones(simulate(make_schedule("1f1b", 2, 2), EQUAL)).used


def test_what_overlaps_is_stacked() -> None:
    a, b, c = (Span(0, Kind.FORWARD, 0, m, start, end) for m, start, end in ((0, 0, 2), (1, 1, 3), (2, 2, 4)))
    assert stack([b, c, a]) == [[a, c], [b]]
    assert stack([]) == []
