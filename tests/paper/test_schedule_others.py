"""1F1B, forward only, and the catalog."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Action, Kind, Placement, Schedule
from deepseek_train.schedule.catalog import make_schedule, placement_of, problems
from deepseek_train.schedule.check import check
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.one_f_one_b import one_f_one_b
from deepseek_train.schedule.simulate import Durations, peak_activations, simulate
from deepseek_train.schedule.text import to_text
from tests.paper.schedules import V_PLACEMENT, evaluation_schedules


def test_rows_of_1f1b() -> None:
    assert to_text(one_f_one_b(3, 4)).splitlines()[1:] == [
        "rank 0: 0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "rank 1: 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "rank 2: 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(1, 64))
def test_1f1b_runs_with_any_size_and_keeps_no_more_than_the_ranks_behind_it(
    num_ranks: int, num_microbatches: int
) -> None:
    schedule = one_f_one_b(num_ranks, num_microbatches)
    check(schedule)
    expected = tuple(min(num_ranks - rank, num_microbatches) for rank in range(num_ranks))
    assert peak_activations(schedule) == expected


def test_1f1b_refuses_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="at least one micro-batch, got 0: use 1 or more"):
        one_f_one_b(2, 0)


@settings(max_examples=40, deadline=None)
@given(evaluation_schedules())
def test_forward_only_runs_every_forward_and_nothing_else(schedule: Schedule) -> None:
    check(schedule)
    placement = schedule.placement
    done = [step for row in schedule.steps_R for step in row]
    chunks = product(range(placement.num_stages), range(placement.num_microbatches))
    assert len(done) == len(set(done))
    assert set(done) == {Action(stage, Kind.FORWARD, microbatch) for stage, microbatch in chunks}


def test_forward_only_works_where_a_rank_holds_neighbouring_stages() -> None:
    check(forward_only(V_PLACEMENT))


@pytest.mark.parametrize("num_ranks", [2, 8, 16])
def test_forward_only_from_both_ends_idles_no_longer_than_one_fill(num_ranks: int) -> None:
    placement = placement_of("dualpipe", num_ranks, 4 * num_ranks)
    timeline = simulate(forward_only(placement), Durations(1.0, 1.0, 1.0, 3.0))
    assert timeline.makespan() <= 4 * num_ranks + num_ranks - 1


def test_the_catalog_makes_what_its_placement_says() -> None:
    for name in ("dualpipe", "1f1b"):
        schedule = make_schedule(name, 4, 8)
        assert schedule.name == name
        assert schedule.placement == placement_of(name, 4, 8)
        assert problems(name, 4, 8) == []


def test_the_catalog_lists_all_problems_at_once() -> None:
    found = problems("dualpipe", 5, 7)
    assert [mend in found[i] for i, mend in enumerate(("use 6 ranks", "use 8", "use 10 or more"))] == [
        True
    ] * 3
    assert len(problems("1f1b", 0, 0)) == 2


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    assert problems("zb", 4, 8) == ["no schedule is named 'zb': use one of dualpipe, 1f1b"]
    for call in (make_schedule, placement_of):
        with pytest.raises(ValueError, match="use one of dualpipe, 1f1b"):
            call("zb", 4, 8)


def test_placement_knows_the_copies_of_a_stage() -> None:
    placement: Placement = placement_of("dualpipe", 4, 8)
    assert placement.holders_of(1) == (1, 2)
    assert placement.stages_of(3) == (0, 3)
