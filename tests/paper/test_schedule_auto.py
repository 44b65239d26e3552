"""Searched schedules: legal, runnable, within their limits, never slower than the known ones, and faster where it
is said.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule
from deepseek_train.schedule.auto import best, search
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.check import check
from deepseek_train.schedule.dataflow import actions_of
from deepseek_train.schedule.dualpipe import mirrored
from deepseek_train.schedule.lower import lower
from deepseek_train.schedule.placements import straight
from deepseek_train.schedule.search.compiled import Compiled
from deepseek_train.schedule.search.list_scheduler import Policy, play
from deepseek_train.schedule.search.memory import Limits
from deepseek_train.schedule.simulate import Durations, peak_activations, peak_weight_queue, seconds, simulate
from tests.paper.schedules import dualpipe_sizes, training_schedules
from tests.paper.test_schedule_lower import Links, execute
from tests.paper.test_schedule_queues import Machine

EQUAL = Durations(1.0, 1.0, 1.0, 3.0)
FEW = 250  # moves: enough to improve small schedules


@st.composite
def durations(draw: st.DrawFn, num_stages: int) -> Durations:
    """Equal or unequal stages; a pair takes from its longer half to both halves; messages may take time."""
    unit = st.sampled_from([0.25, 0.7, 1.0, 1.3, 2.0])
    count = draw(st.sampled_from([1, num_stages]))
    forward, backward_input, backward_weight = (
        tuple(draw(st.lists(unit, min_size=count, max_size=count))) for _ in range(3)
    )
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    overlapped = tuple(
        max(f, i + w) + share * min(f, i + w)
        for f, i, w in zip(forward, backward_input, backward_weight, strict=True)
    )
    latency = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if count == 1:
        return Durations(forward[0], backward_input[0], backward_weight[0], overlapped[0], latency)
    return Durations(forward, backward_input, backward_weight, overlapped, latency)


def v_placement(num_ranks: int, num_microbatches: int) -> Placement:
    """Stages r and 2 P - 1 - r on rank r, one direction."""
    ranks = [*range(num_ranks), *reversed(range(num_ranks))]
    return Placement(num_ranks, num_microbatches, tuple((rank,) for rank in ranks))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    num_ranks, half = draw(st.sampled_from([2, 4])), draw(st.integers(1, 4))
    return draw(st.sampled_from([mirrored, straight, v_placement]))(num_ranks, 2 * half)


def _span(schedule: Schedule, times: Durations) -> float:
    return simulate(schedule, times).makespan()


def _peak_held(schedule: Schedule) -> int:
    """The most activations and queued weight gradients of any rank, a pair counting as both at once."""
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_INPUT: 0, Kind.BACKWARD_WEIGHT: -1}
    most = 0
    for row in schedule.steps_R:
        held = 0
        for action in (action for step in row for action in actions_of(step)):
            held += change[action.kind]
            most = max(most, held)
    return most


def _slower_end(num_ranks: int, factor: float, overlapped: float = 3.0, end: int = -1) -> Durations:
    times = [1.0] * num_ranks
    times[end] = factor
    each = tuple(times)
    return Durations(each, each, each, tuple(overlapped * t for t in each))


@settings(max_examples=12, deadline=None)
@given(st.data(), placements(), st.integers(0, 5))
def test_what_is_found_is_legal_runs_and_stays_within_its_limits(
    data: st.DataObject, placement: Placement, more: int
) -> None:
    limit = max(len(placement.stages_of(0)) if placement.num_directions == 1 else 1, more)
    times = data.draw(durations(placement.num_stages))
    schedule = search(placement, times, limit, max_moves=FEW)
    assert (schedule.name, schedule.placement) == ("auto", placement)
    check(schedule)
    assert max(peak_activations(schedule)) <= limit
    assert _peak_held(schedule) <= limit
    assert Machine(schedule).run() == []
    order = random.Random(0)
    execute(schedule, lower(schedule), order, Links())


@settings(max_examples=10, deadline=None)
@given(st.data(), st.sampled_from([(2, 4), (2, 8), (4, 8), (4, 10)]))
def test_never_slower_than_dualpipe_with_no_more_memory(data: st.DataObject, sizes: tuple[int, int]) -> None:
    known = make_schedule("dualpipe", *sizes)
    times = data.draw(durations(sizes[0]))
    found = search(known.placement, times, max_moves=FEW)
    assert _span(found, times) <= _span(known, times)
    assert max(peak_activations(found)) <= max(peak_activations(known))
    assert _peak_held(found) <= _peak_held(known)


@settings(max_examples=8, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 8))
def test_the_best_placement_is_never_slower_than_1f1b(data: st.DataObject, ranks: int, count: int) -> None:
    times = data.draw(durations(ranks))
    assert _span(best(ranks, count, times, max_moves=FEW), times) <= _span(
        make_schedule("1f1b", ranks, count), times
    )


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "times", "gain"),
    [
        (4, 8, EQUAL, 0.03),
        (4, 8, Durations(1.0, 1.3, 0.7, 3.0), 0.03),
        (4, 12, Durations((0.7, 1.0, 1.3, 0.85), 1.0, 1.0, 2.7), 0.005),
        (4, 8, _slower_end(4, 0.4, 2.7, end=0), 0.01),
        (8, 16, Durations((1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.6), 1.0, 1.0, 3.0), 0.01),
    ],
)
def test_faster_than_dualpipe(num_ranks: int, num_microbatches: int, times: Durations, gain: float) -> None:
    known = _span(make_schedule("dualpipe", num_ranks, num_microbatches), times)
    found = _span(best(num_ranks, num_microbatches, times, max_moves=2000), times)
    assert found <= (1 - gain) * known


def test_a_stage_that_fills_its_ranks_completely_leaves_nothing_to_gain() -> None:
    times = _slower_end(4, 1.6)
    known = _span(make_schedule("dualpipe", 4, 8), times)
    assert _span(best(4, 8, times), times) == known == pytest.approx(8 * 3 * 1.3)


def test_equal_stages_reach_the_bound_of_the_placement() -> None:
    """M (F + B) and the fill of the middle ranks: DualPipe's idle time is twice that."""
    found = best(4, 8, EQUAL)
    assert _span(found, EQUAL) == 25.0 == Compiled(mirrored(4, 8), EQUAL).bound()


def test_less_memory_costs_time() -> None:
    spans = [_span(best(4, 8, EQUAL, limit, max_moves=FEW), EQUAL) for limit in (1, 2, 5)]
    assert spans[0] > spans[1] > spans[2]
    assert spans[0] <= 4 * 8 * 3.0


def test_the_same_every_time() -> None:
    times = _slower_end(4, 1.3, 2.5)
    assert best(4, 10, times, max_moves=FEW) == best(4, 10, times, max_moves=FEW)
    assert best(4, 10, times, seed=1, max_moves=FEW) == best(4, 10, times, seed=1, max_moves=FEW)


def test_a_weight_queue_is_bounded_together_with_the_activations() -> None:
    found = search(straight(4, 12), EQUAL, 4, max_held=5, max_moves=FEW)
    assert max(peak_activations(found)) <= 4
    assert _peak_held(found) <= 5
    assert max(peak_weight_queue(found)) >= 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_activations": 1}, "max_activations=1: .* 4 stages on 2 ranks keeps 2 .* use 2 or more"),
        ({"max_activations": 3, "max_held": 1}, "max_held=1: .* use 2 or more"),
    ],
)
def test_limits_nothing_can_keep_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(v_placement(2, 4), EQUAL, **limits)
    assert max(peak_activations(search(v_placement(2, 4), EQUAL, 2, max_moves=FEW))) == 2


def test_durations_of_other_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"durations.forward has 3 stages, the placement 4: give one number"):
        search(mirrored(4, 8), Durations((1.0, 1.0, 1.0), 1.0, 1.0, 3.0))


@settings(max_examples=30, deadline=None)
@given(st.data(), training_schedules())
def test_compiled_rows_take_as_long_as_the_simulator_says(data: st.DataObject, schedule: Schedule) -> None:
    times = data.draw(durations(schedule.placement.num_stages))
    work = Compiled(schedule.placement, times)
    rows = work.rows(schedule)
    assert work.schedule(schedule.name, rows) == schedule
    assert work.makespan(rows) == _span(schedule, times)
    assert work.bound() <= work.makespan(rows) * (1 + 1e-9)


def test_compiled_rows_that_wait_for_ever_take_for_ever() -> None:
    work = Compiled(straight(2, 2), EQUAL)
    rows = work.rows(make_schedule("1f1b", 2, 2))
    rows[0].reverse()
    assert work.makespan(rows) == float("inf")


@settings(max_examples=20, deadline=None)
@given(st.data(), placements(), st.integers(2, 6), st.integers(0, 3))
def test_every_policy_gives_a_legal_schedule(
    data: st.DataObject, placement: Placement, activations: int, more: int
) -> None:
    liking = st.floats(-3.0, 3.0)
    policy = Policy(*data.draw(st.lists(liking, min_size=13, max_size=13)))
    work = Compiled(placement, data.draw(durations(placement.num_stages)))
    schedule = work.schedule("played", play(work, Limits(activations, activations + more), policy))
    check(schedule)
    assert max(peak_activations(schedule)) <= activations
    assert _peak_held(schedule) <= activations + more


@settings(max_examples=10, deadline=None)
@given(dualpipe_sizes())
def test_dualpipe_keeps_one_more_than_it_has_ranks_weight_gradients_included(sizes: tuple[int, int]) -> None:
    work = Compiled(mirrored(*sizes), EQUAL)
    schedule = make_schedule("dualpipe", *sizes)
    rows = work.rows(schedule)
    assert _peak_held(schedule) == sizes[0] + 1
    assert all(Limits(sizes[0] + 1, sizes[0] + 1).allow(row, work.num_chunks) for row in rows)
    assert not all(Limits(sizes[0], sizes[0] + 1).allow(row, work.num_chunks) for row in rows)
    assert not all(Limits(sizes[0] + 1, sizes[0]).allow(row, work.num_chunks) for row in rows)


def test_a_pair_of_two_stages_takes_its_own_halves_less_what_pairing_saves() -> None:
    times = Durations((1.0, 2.0), (1.0, 3.0), (1.0, 3.0), (2.0, 7.0))

    def pair(forward: int, backward: int) -> float:
        return seconds(Pair(Action(forward, Kind.FORWARD, 0), Action(backward, Kind.BACKWARD, 1)), times)

    assert (pair(0, 0), pair(1, 1)) == (2.0, 7.0)
    assert (pair(0, 1), pair(1, 0)) == (1.0 + 6.0 - 1.0, 2.0 + 2.0 - 1.0)  # both stages save 1
    assert pair(0, 1) + pair(1, 0) == pair(0, 0) + pair(1, 1)
