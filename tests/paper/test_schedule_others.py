"""Rows of the one-directional schedules, worked out by hand, and forward only."""

from itertools import product

import pytest
from hypothesis import given, settings

from deepseek_train.schedule.action import Action, Kind, Schedule
from deepseek_train.schedule.catalog import placement_of
from deepseek_train.schedule.check import check
from deepseek_train.schedule.dualpipe_v import dualpipe_v
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.gpipe import gpipe
from deepseek_train.schedule.interleaved import interleaved
from deepseek_train.schedule.one_f_one_b import one_f_one_b
from deepseek_train.schedule.simulate import Durations, simulate
from deepseek_train.schedule.text import to_text
from deepseek_train.schedule.zb_h1 import zb_h1
from deepseek_train.schedule.zb_v import zb_v
from tests.paper.schedules import V_PLACEMENT, evaluation_schedules


def test_rows_of_1f1b() -> None:
    assert to_text(one_f_one_b(3, 4)).splitlines()[1:] == [
        "rank 0: 0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "rank 1: 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "rank 2: 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_rows_of_gpipe() -> None:
    assert to_text(gpipe(2, 3)).splitlines()[1:] == [
        "rank 0: 0F0 0F1 0F2 0B0 0B1 0B2",
        "rank 1: 1F0 1F1 1F2 1B0 1B1 1B2",
    ]


def test_rows_of_zb_h1() -> None:
    """Rank r lets r weight gradients wait; 1F1B's order otherwise."""
    assert to_text(zb_h1(3, 4)).splitlines()[1:] == [
        "rank 0: 0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3",
        "rank 1: 1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
        "rank 2: 2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
    ]


def test_rows_of_interleaved_1f1b() -> None:
    """Two ranks, two stages each, five micro-batches: groups of 3 and 2."""
    assert to_text(interleaved(2, 5)).splitlines()[1:] == [
        "rank 0: 0F0 0F1 0F2 2F0 2F1 2F2 2B0 0F3 2B1 0F4 2B2 2F3 0B0 2F4 0B1 0B2 2B3 2B4 0B3 0B4",
        "rank 1: 1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 1F3 1B0 1F4 1B1 3F3 1B2 3F4 3B3 3B4 1B3 1B4",
    ]


def test_interleaved_with_one_stage_a_rank_is_1f1b() -> None:
    assert interleaved(4, 7, 1).steps_R == one_f_one_b(4, 7).steps_R


def test_rows_of_zb_v() -> None:
    """DualPipeV's rows (see below) with pairs apart, backward first, and weight gradients as late as they fit."""
    assert to_text(zb_v(2, 4)).splitlines()[1:] == [
        "rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 "
        "3I3 0I2 3W3 0I3 0W2 0W3",
        "rank 1: 1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 1I2 2I3 1I3 2W2 1W2 2W3 1W3",
    ]


def test_rows_of_dualpipe_v() -> None:
    """By hand from the eight steps (V3_SPEC B.3 and B.7): R=2, M=4."""
    assert to_text(dualpipe_v(2, 4)).splitlines()[1:] == [
        "rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3&3B1 3F2&0B0 3B2 3F3&0B1 3B3 0I2 0W2 0I3 0W3",
        "rank 1: 1F0 2F0 1F1 2F1 1F2 2B0 2F2&1B0 1F3&2B1 2F3&1B1 2B2 1B2 2I3 1I3 2W3 1W3",
    ]


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
