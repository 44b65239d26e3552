"""Simulated times against the closed forms (V3 report table 2) and independent simulations."""

import pytest
from hypothesis import given, settings

from deepseek_train.schedule.action import Kind, Pair, Schedule
from deepseek_train.schedule.catalog import NAMES, make_schedule
from deepseek_train.schedule.dualpipe import dualpipe
from deepseek_train.schedule.simulate import Durations, simulate
from deepseek_train.schedule.text import from_text
from tests.paper.schedules import schedules

EQUAL = Durations(forward=1.0, backward_input=1.0, backward_weight=1.0, overlapped=3.0)


def _idle(schedule: Schedule, durations: Durations) -> list[float]:
    timeline = simulate(schedule, durations)
    return [timeline.makespan() - timeline.busy(rank) for rank in range(timeline.num_ranks)]


@pytest.mark.parametrize(
    ("durations", "least", "most"),
    [
        (Durations(1.0, 1.0, 1.0, 2.4), 3.0, 4.2),
        (Durations(1.0, 1.3, 0.7, 3.0), 7.8, 7.8),
        (Durations(9.0, 14.6, 7.7, 32.1), 84.9, 86.5),  # a layer of the published profile, ms
    ],
)
def test_idle_time_with_unequal_times_stays_below_the_formula(
    durations: Durations, least: float, most: float
) -> None:
    idle = _idle(dualpipe(8, 20), durations)
    assert min(idle) == pytest.approx(least)
    assert max(idle) == pytest.approx(most)


def test_spans_of_a_run_worked_out_by_hand() -> None:
    """Stage times differ, messages take 0.5 s; a pair delivers both its outputs at its end."""
    schedule = from_text(
        "x microbatches=2 stages=0,1\nrank 0: 0F0 0F1 0I0 0W0 0B1\nrank 1: 1F0 1F1&1B0 1B1\n"
    )
    durations = Durations((1.0, 2.0), (1.0, 3.0), (0.25, 1.0), (9.0, 4.5), latency=0.5)
    spans = {(s.kind, s.stage, s.microbatch): (s.start, s.end) for s in simulate(schedule, durations).spans}
    assert spans == {
        (Kind.FORWARD, 0, 0): (0.0, 1.0),
        (Kind.FORWARD, 0, 1): (1.0, 2.0),
        (Kind.FORWARD, 1, 0): (1.5, 3.5),
        (Kind.FORWARD, 1, 1): (3.5, 5.0),  # 2 of the 2 + 4 shares of 4.5
        (Kind.BACKWARD, 1, 0): (5.0, 8.0),
        (Kind.BACKWARD_INPUT, 0, 0): (8.5, 9.5),
        (Kind.BACKWARD_WEIGHT, 0, 0): (9.5, 9.75),
        (Kind.BACKWARD, 1, 1): (8.0, 12.0),
        (Kind.BACKWARD, 0, 1): (12.5, 13.75),
    }


@settings(max_examples=30, deadline=None)
@given(schedules())
def test_work_is_conserved_and_ranks_do_one_thing_at_a_time(schedule: Schedule) -> None:
    timeline = simulate(schedule, Durations(0.3, 0.5, 0.2, 0.8))
    seconds = {Kind.FORWARD: 0.3, Kind.BACKWARD: 0.7, Kind.BACKWARD_INPUT: 0.5, Kind.BACKWARD_WEIGHT: 0.2}
    for rank, row in enumerate(schedule.steps_R):
        work = sum(0.8 if isinstance(step, Pair) else seconds[step.kind] for step in row)
        assert timeline.busy(rank) == pytest.approx(work)
        spans = [span for span in timeline.spans if span.rank == rank]
        assert all(a.end <= b.start + 1e-9 for a, b in zip(spans, spans[1:], strict=False))
    assert 0.0 <= timeline.bubble_fraction() < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_latency_costs_time(name: str) -> None:
    schedule = make_schedule(name, 4, 16)
    slow = Durations(1.0, 1.0, 1.0, 3.0, latency=0.5)
    assert simulate(schedule, slow).makespan() > simulate(schedule, EQUAL).makespan()
