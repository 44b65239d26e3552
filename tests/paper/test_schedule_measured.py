"""Durations read back from timelines."""

import pytest

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.measured import measured_durations
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.simulate import Durations, simulate
from deepseek_train.schedule.timeline import PhaseSpan, Span, Timeline

ASKED = Durations((1.0, 2.0, 3.0, 4.0), (1.5, 2.5, 3.5, 4.5), (0.5, 0.25, 1.0, 2.0), (2.75, 4.0, 7.0, 10.0))


def test_what_was_simulated_is_found_again() -> None:
    """1F1B has no pairs and no split backward: its full backwards are halved."""
    found = measured_durations(simulate(make_schedule("1f1b", 4, 8), ASKED), 4)
    assert found.forward == pytest.approx(ASKED.forward)
    halves = [(i + w) / 2 for i, w in zip(ASKED.backward_input, ASKED.backward_weight, strict=True)]
    assert found.backward_input == found.backward_weight == pytest.approx(halves)
    assert found.overlapped == pytest.approx([3.0, 4.75, 7.5, 10.5])


def test_pairs_and_weight_gradients_of_a_real_timeline() -> None:
    """The halves of a real pair share its time; a full backward's phases say what its weight gradients took."""
    spans = (
        Span(0, Kind.FORWARD, 0, 0, 0.0, 1.0),
        Span(0, Kind.BACKWARD, 0, 0, 1.0, 4.0),
        Span(0, Kind.FORWARD, 0, 1, 4.0, 7.5, paired=True),
        Span(0, Kind.BACKWARD, 0, 2, 4.0, 7.5, paired=True),
    )
    weights = (
        PhaseSpan(0, Lane.COMPUTE, "experts", Kind.BACKWARD_WEIGHT, 0, 0, 2.0, 2.5),
        PhaseSpan(0, Lane.COMPUTE, "attend", Kind.BACKWARD_WEIGHT, 0, 0, 3.5, 4.0),
        PhaseSpan(0, Lane.COMPUTE, "attend", Kind.BACKWARD_INPUT, 0, 0, 3.0, 3.5),
    )
    found = measured_durations(Timeline(1, spans, weights), 1)
    assert found == Durations((1.0,), (2.0,), (1.0,), (3.5,))


def test_a_stage_that_never_ran_alone_is_named() -> None:
    with pytest.raises(ValueError, match="stage 1 has no F outside overlapped pairs"):
        measured_durations(simulate(make_schedule("1f1b", 1, 2), Durations(1.0, 1.0, 1.0, 3.0)), 2)
