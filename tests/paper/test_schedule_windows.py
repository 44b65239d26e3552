"""Boundary buffers of O(stages): windows that are proved, and the machine that proves them."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.catalog import NAMES, make_schedule, placement_of
from deepseek_train.schedule.check import check
from deepseek_train.schedule.dataflow import MessageKind
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.lower import Link, lower, sends_in_flight
from deepseek_train.schedule.replay import replay
from deepseek_train.schedule.text import from_text
from deepseek_train.schedule.windows import send_windows
from tests.paper.schedules import schedules
from tests.paper.test_schedule_lower import Links, execute


@settings(max_examples=50, deadline=None)
@given(schedules(ranks=10, microbatches=32), st.integers(0, 3))
@example(forward_only(placement_of("1f1b", 4, 64)), 1)
@example(make_schedule("gpipe", 4, 64), 1)
def test_windows_are_of_the_order_of_stages_and_never_block_for_good(
    schedule: Schedule, prefetch: int
) -> None:
    windows = send_windows(schedule, prefetch=prefetch)
    unlimited = sends_in_flight(schedule, prefetch=prefetch)
    stages = schedule.placement.num_stages
    assert windows == {link: min(count, stages) for link, count in unlimited.items()}
    assert replay(schedule.placement, lower(schedule, prefetch=prefetch), windows) == {}


@settings(max_examples=30, deadline=None)
@given(schedules(ranks=5, microbatches=10), st.randoms(use_true_random=False))
def test_ranks_in_any_order_run_to_the_end_with_these_windows(
    schedule: Schedule, order: random.Random
) -> None:
    execute(schedule, lower(schedule), order, Links(window=send_windows(schedule)))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_rank_holds_does_not_grow_with_the_number_of_microbatches(name: str) -> None:
    """All its links together, training and evaluation: the same from 24 to 48 micro-batches."""
    held = []
    for count in (24, 48):
        training = make_schedule(name, 4, count)
        both = training, forward_only(training.placement)
        held.append([_held(send_windows(schedule), rank) for schedule in both for rank in range(4)])
    assert held[0] == held[1]
    assert max(held[0]) <= 2 * training.placement.num_stages


def _held(windows: dict[Link, int], rank: int) -> int:
    return sum(count for (source, _, _), count in windows.items() if source == rank)


BOTH_WAYS: list[Link] = [(0, 1, MessageKind.ACTIVATION), (1, 0, MessageKind.ACTIVATION)]


def _floods(count: int) -> Schedule:
    """Both ranks send all they have to each other before either takes anything."""
    own, other = [" ".join(f"{{0}}F{m + half}" for m in range(count)) for half in (0, count)]
    rows = f"rank 0: {own.format(0)} {other.format(1)}\nrank 1: {other.format(0)} {own.format(1)}\n"
    return from_text(f"floods microbatches={2 * count} stages=0/1,1/0\n{rows}")


def test_the_replay_finds_senders_that_wait_for_each_other() -> None:
    schedule = _floods(5)
    programs = lower(schedule)
    links = sends_in_flight(schedule)
    assert replay(schedule.placement, programs, links) == {}
    assert links == dict.fromkeys(BOTH_WAYS, 5)
    stuck = replay(schedule.placement, programs, dict.fromkeys(links, 3))
    assert {r: str(programs[r][i]) for r, i in stuck.items()} == {0: "send(1a3>1)", 1: "send(1a8>0)"}


def test_a_real_schedule_would_block_with_too_small_a_window() -> None:
    schedule = make_schedule("interleaved_1f1b", 6, 16)
    programs = lower(schedule)
    windows = send_windows(schedule)
    assert replay(schedule.placement, programs, dict.fromkeys(windows, 2)) == {}
    assert replay(schedule.placement, programs, dict.fromkeys(windows, 1)) != {}


def test_a_schedule_that_would_block_keeps_the_windows_that_never_do() -> None:
    schedule = _floods(5)
    check(schedule)
    assert send_windows(schedule) == sends_in_flight(schedule) == dict.fromkeys(BOTH_WAYS, 5)
