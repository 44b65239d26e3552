"""Durations read back from timelines."""

import json

import pytest

from deepseek_train.schedule.action import Action, Kind, Pair
from deepseek_train.schedule.auto import search
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


PAIRS = [(forward, backward) for forward in (0, 1) for backward in (0, 1)]


def pair_seconds(durations: Durations, forward: int, backward: int) -> float:
    return seconds(Pair(Action(forward, Kind.FORWARD, 0), Action(backward, Kind.BACKWARD, 0)), durations)


@pytest.mark.parametrize("saved", [(0.5, 0.5), (0.25, 0.75), (0.0, 0.0), (-0.25, -0.25)])
def test_simulated_pairs_are_found_again(saved: tuple[float, float]) -> None:
    """DualPipe of two ranks pairs different stages alone: those pairs are found whatever each stage saves, those of
    one stage where both save as much."""
    f, i, w = (1.0, 2.0), (1.5, 2.5), (0.5, 0.25)
    asked = Durations(f, i, w, (3.0 - saved[0], 4.75 - saved[1]))
    found = measured_durations(simulate(make_schedule("dualpipe", 2, 8), asked), 2)
    assert found.forward == pytest.approx(f)
    for stage in (0, 1):
        backward = Action(stage, Kind.BACKWARD, 0)
        assert seconds(backward, found) == pytest.approx(seconds(backward, asked))
    for pair in PAIRS if saved[0] == saved[1] else [(0, 1), (1, 0)]:
        assert pair_seconds(found, *pair) == pytest.approx(pair_seconds(asked, *pair)), pair


def test_pairs_of_one_stage_are_found_again() -> None:
    """A rank with both kinds of pairs: all four are found, where all save as much."""
    asked = Durations((1.0, 2.0), (1.5, 2.5), (0.5, 0.25), (2.5, 4.25))
    spans = []
    for forward, backward in PAIRS:
        start, middle = 10.0 * len(spans), 10.0 * len(spans) + 1
        end = start + pair_seconds(asked, forward, backward)
        spans.append(Span(0, Kind.FORWARD, forward, 7, start, middle, paired=True))
        spans.append(Span(0, Kind.BACKWARD, backward, 7, middle, end, paired=True))
    alone = simulate(make_schedule("zb_h1", 2, 4), asked).spans
    rank_0 = tuple(Span(0, s.kind, s.stage, s.microbatch, s.start, s.end) for s in alone)
    found = measured_durations(Timeline(1, (*rank_0, *spans)), 2)
    for pair in PAIRS:
        assert pair_seconds(found, *pair) == pytest.approx(pair_seconds(asked, *pair)), pair


def test_a_search_with_measured_times_is_no_slower_than_dualpipe_with_the_true_ones() -> None:
    """A mixed pair's time taken for one of a single stage would make pairs look cheaper, or dearer, than they are."""
    each = (1.0, 1.0, 1.0, 2.0)
    true = Durations(each, each, each, tuple(3 * f for f in each))
    known = make_schedule("dualpipe", 4, 8)
    timeline = simulate(known, true)
    found = search(known.placement, measured_durations(timeline, 4))
    assert simulate(found, true).makespan() <= timeline.makespan()


def test_durations_survive_json() -> None:
    durations = Durations((1.0, 2.5), (1.5, 2.5), 1.0, (2.75, 4.0), latency=0.25)
    assert durations_from_json(durations_to_json(durations)) == durations


def written(**changed: object) -> str:
    """A file of times of two stages, but for what is ``changed``."""
    two = {"forward": 1.0, "backward_input": [1.0, 2.0], "backward_weight": 1.0, "overlapped": [3.0, 4.0]}
    return json.dumps({**two, "latency": 0.0, **changed})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "one JSON object with backward_input"),
        ('{"forward": 1}', "one JSON object with backward_input"),
        (durations_to_json(ASKED).replace("1.5", "-1"), "backward_input holds -1, which is no number"),
        (durations_to_json(ASKED).replace("1.5", '"x"'), "backward_input holds 'x', which is no number"),
        ("nonsense", "Expecting value"),
        (written(latency=[0.0]), "latency lists 1 times: write one number"),
        (written(forward=True), "forward holds True, which is no number"),
        (written(forward=[1.0, False]), "forward holds False, which is no number"),
        (written(forward=[1.0]), r"forward 1, backward_input 2.*: write one for each stage in every list"),
        (written(forward=[]), "write one for each stage"),
        (written(forward=0, backward_input=[0, 0], backward_weight=0), "all times are 0: write what forward"),
    ],
)
def test_other_texts_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        durations_from_json(text)


def test_a_stage_that_never_ran_alone_is_named() -> None:
    with pytest.raises(ValueError, match="stage 1 has no F outside overlapped pairs"):
        measured_durations(simulate(make_schedule("1f1b", 1, 2), Durations(1.0, 1.0, 1.0, 3.0)), 2)
