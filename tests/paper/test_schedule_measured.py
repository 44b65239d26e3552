"""Durations read back from timelines."""

import pytest

from deepseek_train.schedule.action import Action, Kind, Pair
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.measured import durations_from_json, durations_to_json, measured_durations
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.simulate import Durations, seconds, simulate
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


def test_simulated_pairs_are_found_again() -> None:
    asked = Durations((1.0, 2.0), (1.5, 2.5), (0.5, 0.25), (2.75, 4.0))
    found = measured_durations(simulate(make_schedule("dualpipe", 2, 8), asked), 2)
    assert found.forward == pytest.approx(asked.forward)
    pair = seconds(Pair(Action(0, Kind.FORWARD, 0), Action(1, Kind.BACKWARD, 0)), asked)
    assert found.overlapped[0] == pytest.approx(pair)  # type: ignore[index]


def test_durations_survive_json() -> None:
    durations = Durations((1.0, 2.5), (1.5, 2.5), 1.0, (2.75, 4.0), latency=0.25)
    assert durations_from_json(durations_to_json(durations)) == durations


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "one JSON object with backward_input"),
        ('{"forward": 1}', "one JSON object with backward_input"),
        (durations_to_json(ASKED).replace("1.5", "-1"), "backward_input holds -1, which is no number"),
        (durations_to_json(ASKED).replace("1.5", '"x"'), "backward_input holds 'x', which is no number"),
        ("nonsense", "Expecting value"),
    ],
)
def test_other_texts_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        durations_from_json(text)


def test_a_stage_that_never_ran_alone_is_named() -> None:
    with pytest.raises(ValueError, match="stage 1 has no F outside overlapped pairs"):
        measured_durations(simulate(make_schedule("1f1b", 1, 2), Durations(1.0, 1.0, 1.0, 3.0)), 2)
