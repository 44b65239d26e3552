"""The checker finds every fault a schedule can have, and shows it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Schedule, Step
from deepseek_train.schedule.check import ScheduleError, check
from deepseek_train.schedule.dualpipe import dualpipe
from deepseek_train.schedule.text import from_text
from tests.paper.schedules import V_PLACEMENT, schedules, training_schedules

TWO_RANKS = "test microbatches=2 stages=0,1\n"


def _with_row(schedule: Schedule, rank: int, row: tuple[Step, ...]) -> Schedule:
    rows = schedule.steps_R[:rank] + (row,) + schedule.steps_R[rank + 1 :]
    return Schedule(schedule.name, schedule.placement, rows)


def _somewhere(data: st.DataObject, schedule: Schedule) -> tuple[int, int]:
    rank = data.draw(st.integers(0, schedule.placement.num_ranks - 1))
    return rank, data.draw(st.integers(0, len(schedule.steps_R[rank]) - 1))


@settings(max_examples=60, deadline=None)
@given(st.data(), training_schedules().filter(lambda s: len(s.steps_R[0]) > 2))
def test_a_step_dropped_or_doubled_is_found(data: st.DataObject, schedule: Schedule) -> None:
    rank, index = _somewhere(data, schedule)
    row = schedule.steps_R[rank]
    with pytest.raises(ScheduleError):
        check(_with_row(schedule, rank, row[:index] + row[index + 1 :]))
    with pytest.raises(ScheduleError):
        check(_with_row(schedule, rank, row[:index] + (row[index],) + row[index:]))


@settings(max_examples=30, deadline=None)
@given(st.data(), schedules().filter(lambda s: s.placement.num_ranks > 1))
def test_a_step_on_another_rank_is_found(data: st.DataObject, schedule: Schedule) -> None:
    rank, index = _somewhere(data, schedule)
    other = (
        rank + data.draw(st.integers(1, schedule.placement.num_ranks - 1))
    ) % schedule.placement.num_ranks
    step, row = schedule.steps_R[rank][index], schedule.steps_R[other]
    moved = _with_row(schedule, rank, schedule.steps_R[rank][:index] + schedule.steps_R[rank][index + 1 :])
    with pytest.raises(ScheduleError):
        check(_with_row(moved, other, row[:index] + (step,) + row[index:]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0F0 0F1 0B0 0B1", "1F0 1B0 1B0 1F1 1B1"), "rank 1, step 2: 1B0 is a second backward"),
        (("0F0 0F0", ""), "rank 0, step 1: 0F0 runs twice"),
        (("0F0 0F1 0B1 0B0", "1B0 1F0"), "1B0 has no forward before it"),
        (("0F0 0F2", ""), "0F2 is outside the 2 stages and 2 micro-batches"),
        (("0F0 1F0", ""), "rank 0, step 1: 1F0 belongs to rank 1"),
        (("0F0 0F1 0B0", ""), "rank 0, step 3: 0B1 is missing"),
        (("0F0", ""), "rank 0, step 1: 0F1 is missing"),
        (("0F0 0F1 0W0", ""), r"0W0 has no input-only backward \(I\) queued before it"),
        (("0F0 0F1 0I0 0I1 0W1 0W0", ""), "0W1 overtakes the oldest queued weight gradient, 0W0"),
        (("0F0 0F1 0I0 0B1", ""), "0W0 is missing: its input-only backward is still queued"),
        (("0F0 0F1 0I0 0B0", ""), "0B0 is a second backward"),
        (("0F0 0F1&0I0", ""), "a pair is a forward"),
        (("0F0 0F1&0B1 0B0", ""), "0B1 has no forward before it"),
        (("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), "rank 0, step 1: deadlock.*also stuck, rank 1 at 1F1"),
        (
            ("0F0 0F1&0B0 0B1", "1F0 1F1 1B0 1B1"),
            "deadlock: .*gradient of micro-batch 0 for stage 0 from rank 1",
        ),
    ],
)
def test_what_is_wrong_is_named(rows: tuple[str, str], message: str) -> None:
    text = TWO_RANKS + "".join(f"rank {rank}: {row}\n" for rank, row in enumerate(rows))
    with pytest.raises(ScheduleError, match=message):
        check(from_text(text))


def test_the_arrow_stands_under_the_fault() -> None:
    schedule = dualpipe(8, 20)
    row = schedule.steps_R[2]
    swapped = row[:20] + (row[21], row[20]) + row[22:]
    with pytest.raises(ScheduleError) as caught:
        check(_with_row(schedule, 2, (*swapped[:25], row[3], *swapped[25:])))
    first, line, arrow = str(caught.value).splitlines()
    assert first == f"dualpipe, rank 2, step 25: {row[3]} runs twice"
    assert line.startswith("rank 2: ... ")
    assert line.endswith(" ...")
    assert line[arrow.index("^") :].split()[0] == str(row[3])


def test_a_schedule_without_backwards_is_complete_one_with_some_is_not() -> None:
    check(from_text(TWO_RANKS + "rank 0: 0F0 0F1\nrank 1: 1F0 1F1"))
    with pytest.raises(ScheduleError, match="rank 0, step 2: 0B0 is missing"):
        check(from_text(TWO_RANKS + "rank 0: 0F0 0F1\nrank 1: 1F0 1F1 1B0 1B1"))


def test_neighbouring_stages_on_one_rank_hand_over_without_a_message() -> None:
    rows = "rank 0: 0F0 3F0 3B0 0B0\nrank 1: 1F0 2F0 2I0 1I0 2W0 1W0"
    check(from_text("v microbatches=1 stages=0,1,1,0\n" + rows))
    assert V_PLACEMENT.stages_of(1) == (1, 2)


def test_the_placement_itself_is_checked() -> None:
    with pytest.raises(ScheduleError, match="stage 1 is placed on rank 1, of only 1 ranks"):
        check(from_text("x microbatches=1 stages=0,1\nrank 0: 0F0"))
    placed_on_two = from_text(TWO_RANKS + "rank 0: 0F0\nrank 1: 1F0")
    with pytest.raises(ScheduleError, match="1 rows for 2 ranks"):
        check(Schedule("x", placed_on_two.placement, placed_on_two.steps_R[:1]))


@pytest.mark.parametrize(
    "text",
    ["1f1b microbatches=0 stages=0,1\nrank 0:\nrank 1:\n", "1f1b microbatches=4 stages=0\n"],
)
def test_a_schedule_without_work_or_ranks_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="have nothing to do"):
        check(from_text(text))
