"""Simulated idle time against the closed forms: exact where they claim to be, and where they are not, by how much
(docs/schedules.md holds the same numbers).
"""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.catalog import NAMES, formula_bubble, make_schedule, stages_per_rank_of
from deepseek_train.schedule.simulate import Durations, simulate
from tests.paper.schedules import legal_sizes

EQUAL = Durations(forward=1.0, backward_input=1.0, backward_weight=1.0, overlapped=3.0)
PROFILE = Durations(9.0, 14.6, 7.7, 32.1)  # a layer of DeepSeek's published profile, ms


def _idle(schedule: Schedule, durations: Durations) -> tuple[float, ...]:
    timeline = simulate(schedule, durations)
    return tuple(timeline.makespan() - timeline.busy(rank) for rank in range(timeline.num_ranks))


def _formula(name: str, sizes: tuple[int, ...], durations: Durations) -> float | None:
    stages_per_rank = stages_per_rank_of(name, *sizes[2:])
    return formula_bubble(name, sizes[0] * stages_per_rank, durations, *sizes[2:])


def _least(name: str, num_ranks: int, stages_per_rank: int) -> int:
    """The number of micro-batches that fills the pipeline."""
    match name:
        case "interleaved_1f1b":
            return num_ranks if stages_per_rank > 1 else 1
        case "zb_h1":
            return num_ranks
        case "zb_v":
            return 2 * num_ranks
        case _:
            return 1


@st.composite
def filled(draw: st.DrawFn, name: str) -> tuple[int, int, int]:
    num_ranks, num_microbatches, stages_per_rank = draw(legal_sizes(name, ranks=9, microbatches=20))
    least = _least(name, num_ranks, stages_per_rank)
    return num_ranks, max(num_microbatches, least), stages_per_rank


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_with_equal_times_every_form_is_exact_on_every_rank(name: str, data: st.DataObject) -> None:
    sizes = data.draw(filled(name))
    assert set(_idle(make_schedule(name, *sizes), EQUAL)) == {_formula(name, sizes, EQUAL)}


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), times=st.tuples(*[st.integers(1, 40)] * 3))
def test_for_any_times_these_forms_are_exact(name: str, data: st.DataObject, times: tuple[int, ...]) -> None:
    f, i, w = times
    durations = Durations(float(f), float(i), float(w), float(f + i + w))
    assume(name != "zb_h1" or w <= min(f, i))
    sizes = data.draw(filled(name))
    assert set(_idle(make_schedule(name, *sizes), durations)) == {_formula(name, sizes, durations)}


@settings(max_examples=40, deadline=None)
@given(sizes=filled("zb_h1"), times=st.tuples(*[st.integers(1, 40)] * 3))
def test_zb_h1_idles_longer_than_published_where_weight_gradients_take_long(
    sizes: tuple[int, int, int], times: tuple[int, ...]
) -> None:
    """Whatever W hides, the fill cannot be shorter than one way through the pipeline."""
    f, i, w = times
    idle = _idle(make_schedule("zb_h1", *sizes), Durations(float(f), float(i), float(w), 0.0))
    assert set(idle) == {(sizes[0] - 1) * max(f, i, f + i - w)}


@settings(max_examples=60, deadline=None)
@given(sizes=filled("zb_v"), times=st.tuples(*[st.integers(1, 40)] * 3))
def test_zb_v_with_any_times_stays_between_its_fill_and_a_bound(
    sizes: tuple[int, int, int], times: tuple[int, ...]
) -> None:
    f, i, w = times
    idle = _idle(make_schedule("zb_v", *sizes), Durations(float(f), float(i), float(w), 0.0))
    hops = sizes[0] - 1
    assert hops * f <= max(idle) <= hops * max(i, w, 2 * f - i, 2 * f - w, 2 * (i - w))
    assert (_formula("zb_v", sizes, Durations(f, i, w, 0.0)) is None) == (not f == i == w)


@pytest.mark.parametrize("count", [8, 16, 32])
@pytest.mark.parametrize(
    ("name", "ideal"),
    [
        ("1f1b", (0.273, 0.158, 0.086)),
        ("interleaved_1f1b", (0.158, 0.086, 0.045)),
        ("zb_v", (0.059, 0.030, 0.015)),
        ("dualpipe_v", (0.111, 0.059, 0.030)),
        ("dualpipe", (0.077, 0.040, 0.020)),
    ],
)
def test_four_ranks_idle_no_more_than_torch_s_lists_and_the_published_figures(
    name: str, ideal: tuple[float, ...], count: int
) -> None:
    fraction = simulate(make_schedule(name, 4, count), EQUAL).bubble_fraction()
    assert round(fraction, 3) == ideal[(8, 16, 32).index(count)]


@pytest.mark.parametrize(
    ("count", "torch"), [(8, (0.273, 0.158, 0.075, 0.140)), (16, (0.158, 0.086, 0.039, 0.075))]
)
def test_with_unequal_times_too(count: int, torch: tuple[float, ...]) -> None:
    """F 60, I 78, W 42 ms: simulated from torch's own lists."""
    durations = Durations(60.0, 78.0, 42.0, 180.0)
    for name, theirs in zip(("1f1b", "interleaved_1f1b", "zb_v", "dualpipe_v"), torch, strict=True):
        assert round(simulate(make_schedule(name, 4, count), durations).bubble_fraction(), 3) <= theirs


@pytest.mark.parametrize(
    ("name", "durations", "least", "most", "formula"),
    [
        ("dualpipe", Durations(1.0, 1.0, 1.0, 2.4), 3.0, 4.2, 4.2),
        ("dualpipe", Durations(1.0, 1.3, 0.7, 3.0), 7.8, 7.8, 8.7),
        ("dualpipe", Durations(1.0, 1.0, 1.5, 3.5), 6.0, 6.0, 4.5),
        ("dualpipe", PROFILE, 84.9, 86.5, 93.9),
        ("dualpipe_v", Durations(1.0, 1.0, 1.0, 2.4), 6.2, 9.8, 9.8),
        ("dualpipe_v", Durations(1.0, 1.3, 0.7, 3.0), 19.3, 19.3, 20.3),
        ("dualpipe_v", Durations(1.0, 1.0, 1.5, 3.5), 14.0, 14.0, 10.5),
        ("dualpipe_v", PROFILE, 210.1, 214.9, 219.1),
    ],
)
def test_dualpipe_with_unequal_times_differs_from_the_published_form(
    name: str, durations: Durations, least: float, most: float, formula: float
) -> None:
    """8 ranks, 32 micro-batches; the idle time of the ranks differs where a pair takes less than its halves."""
    idle = _idle(make_schedule(name, 8, 32), durations)
    assert min(idle) == pytest.approx(least)
    assert max(idle) == pytest.approx(most)
    assert _formula(name, (8, 32), durations) == pytest.approx(formula)


def test_no_form_is_known_for_stages_of_different_times() -> None:
    uneven = Durations((1.0, 2.0, 1.0, 1.0), 1.0, 1.0, 3.0)
    assert [formula_bubble(name, 4, uneven) for name in NAMES] == [None] * len(NAMES)


def test_forms_go_by_any_spelling_and_refuse_unknown_names() -> None:
    assert formula_bubble("ZB1P", 8, EQUAL) == formula_bubble("zb-h1", 8, EQUAL) == 7.0
    assert formula_bubble("DualPipeV", 16, EQUAL) == 14.0
    with pytest.raises(ValueError, match="did you mean dualpipe"):
        formula_bubble("dualpip", 16, EQUAL)
