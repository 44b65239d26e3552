"""Numbers that ``deepseek-schedule`` prints, against the report's and against times worked out by hand."""

import pytest

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.catalog import formula_bubble, make_schedule
from deepseek_train.schedule.facts import Facts, facts_of
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.simulate import Durations, simulate
from deepseek_train.schedule.timeline import PhaseSpan, Timeline


def _facts(name: str, ranks: int, microbatches: int, times: Durations) -> Facts:
    schedule = make_schedule(name, ranks, microbatches)
    return facts_of(schedule, simulate(schedule, times), times, formula_bubble(name, ranks, times))


def test_dualpipe_with_equal_times() -> None:
    facts = _facts("dualpipe", 8, 20, Durations(1.0, 1.0, 1.0, 3.0))
    assert (facts.name, facts.stages, facts.ranks, facts.microbatches) == ("dualpipe", 8, 8, 20)
    assert facts.makespan == 66
    assert facts.bubble == (6,) * 8
    assert facts.bubble_fraction == pytest.approx(6 / 66)
    assert facts.formula_bubble == 6
    assert facts.peak_activations == (9,) * 8
    assert facts.peak_weight_queue == (1, 2, 3, 4, 4, 3, 2, 1)


def test_dualpipe_with_unequal_times_beats_its_formula() -> None:
    """Every rank works 20 (F + I + W) = 60; the formula says 3 (3 + 2 - 2.1) = 8.7, simulation 7.8."""
    facts = _facts("dualpipe", 8, 20, Durations(1.0, 1.3, 0.7, 3.0))
    assert facts.makespan == pytest.approx(67.8)
    assert facts.bubble == pytest.approx((7.8,) * 8)
    assert facts.formula_bubble == pytest.approx(8.7)


def _phase(rank: int, lane: Lane, start: float, end: float) -> PhaseSpan:
    return PhaseSpan(rank, lane, "x", Kind.FORWARD, 0, 0, start, end)


def test_exposed_communication_is_what_no_computation_of_the_same_rank_covers() -> None:
    compute, communication = Lane.COMPUTE, Lane.COMMUNICATION
    phases = (
        _phase(0, communication, 0, 10),  # 0-1, 4-5 and 9-10 uncovered
        _phase(0, communication, 4.5, 12),  # two messages at once count once: 10-12 more
        _phase(0, compute, 1, 3),
        _phase(0, compute, 2, 4),
        _phase(0, compute, 5, 9),
        _phase(0, communication, 20, 21),
        _phase(0, compute, 19, 22),
        _phase(1, compute, 0, 30),  # another rank covers nothing
    )
    timeline = Timeline(2, (), phases)
    assert timeline.exposed_intervals(0) == [(0, 1), (4, 5), (9, 12)]
    assert timeline.exposed_communication(0) == 5
    assert timeline.exposed_communication(0, 4.5, 11) == 2.5
    assert timeline.exposed_communication(1) == 0
    assert Timeline(1, ()).exposed_communication(0) == 0
