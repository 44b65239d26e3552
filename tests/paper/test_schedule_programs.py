"""``check_programs``: everything it claims to prove, broken once."""

from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Action, Kind, Schedule
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.check_programs import check_programs
from deepseek_train.schedule.dataflow import Message, MessageKind
from deepseek_train.schedule.faults import ScheduleError
from deepseek_train.schedule.lower import Instruction, Program, Receive, Send, link_of, lower
from deepseek_train.schedule.text import from_text
from deepseek_train.schedule.windows import send_windows
from tests.paper.schedules import schedules

SCHEDULE = make_schedule("1f1b", 2, 3)
PROGRAMS = lower(SCHEDULE, prefetch=2)
# rank 0: 0F0 send(1a0>1) 0F1 send(1a1>1) receive(0g0<1) 0B0 0F2 ...
# rank 1: receive(1a0<0) receive(1a1<0) 1F0 1B0 send(0g0>0) ...


def _at(program: list[Instruction], word: str) -> int:
    return [str(instruction) for instruction in program].index(word)


def _swap(first: str, second: str) -> Callable[[list[Instruction]], None]:
    def change(program: list[Instruction]) -> None:
        i, j = _at(program, first), _at(program, second)
        program[i], program[j] = program[j], program[i]

    return change


def _drop(word: str) -> Callable[[list[Instruction]], None]:
    return lambda program: program.pop(_at(program, word)) and None


def _double(word: str) -> Callable[[list[Instruction]], None]:
    return lambda program: program.insert(_at(program, word), program[_at(program, word)])


def _put(instruction: Instruction) -> Callable[[list[Instruction]], None]:
    return lambda program: program.insert(0, instruction)


def _message(source: int, target: int) -> Message:
    return Message(MessageKind.ACTIVATION, 1, 0, source, target)


@pytest.mark.parametrize(
    ("rank", "change", "problem", "word"),
    [
        (
            1,
            lambda p: p.insert(0, p.pop(_at(p, "receive(1a1<0)"))),
            "where rank 0 sends the .*micro-batch 0",
            "receive(1a1<0)",
        ),
        (1, _drop("receive(1a0<0)"), "1F0 needs the .* whose receive is not posted before it", "1F0"),
        (1, _double("receive(1a0<0)"), "micro-batch 0 .* is received twice", "receive(1a0<0)"),
        (1, _swap("receive(1a0<0)", "1F0"), "1F0 needs the activation of micro-batch 0", "1F0"),
        (1, _put(Receive(_message(1, 0))), "goes to rank 0", "receive(1a0<1)"),
        (0, _drop("send(1a1>1)"), "micro-batch 1 for stage 1 from rank 0 is never sent", ""),
        (0, _double("send(1a1>1)"), "is sent before it is made, or twice", "send(1a1>1)"),
        (0, _swap("send(1a0>1)", "0F0"), "is sent before it is made, or twice", "send(1a0>1)"),
        (0, _put(Send(_message(1, 0))), "is not this rank's to send", "send(1a0>0)"),
        (0, _swap("0F0", "0F1"), "0F1 runs where the schedule has 0F0", "0F1"),
        (0, _drop("0B2"), "0B2 is missing", ""),
        (0, lambda p: p.append(Action(0, Kind.FORWARD, 2)), "0F2 runs where .* nothing more", "0F2"),
        (0, _put(Receive(_message(1, 0))), "received but never used", ""),
    ],
)
def test_a_broken_program_is_shown_with_an_arrow_at_the_fault(
    rank: int, change: Callable[[list[Instruction]], None], problem: str, word: str
) -> None:
    programs = [list(program) for program in PROGRAMS]
    change(programs[rank])
    with pytest.raises(ScheduleError, match=f"1f1b, rank {rank}, step .*{problem}") as caught:
        check_programs(SCHEDULE, tuple(map(tuple, programs)))
    _, line, arrow = str(caught.value).splitlines()
    assert line.startswith(f"rank {rank}: ")
    assert line[arrow.index("^") :].partition(" ")[0] == word


def _without(programs: tuple[Program, ...], rank: int, word: str) -> tuple[Program, ...]:
    rows = [list(program) for program in programs]
    _drop(word)(rows[rank])
    return tuple(map(tuple, rows))


def test_what_only_one_end_knows_is_found() -> None:
    """A receive of something never sent, and the other way round, on the rank that stands alone."""
    schedule = make_schedule("1f1b", 2, 1)
    alone = [list(program) for program in lower(schedule)]
    alone[1].append(Receive(_message(0, 1)))
    with pytest.raises(ScheduleError, match="received but never used"):
        check_programs(schedule, tuple(map(tuple, alone)))
    with pytest.raises(ScheduleError, match="never sent"):
        check_programs(schedule, _without(lower(schedule), 0, "send(1a0>1)"))


def test_windows_too_small_are_a_deadlock_with_everyone_named() -> None:
    """Both ranks send twice before either takes anything."""
    rows = "rank 0: 0F0 0F1 1F2 1F3\nrank 1: 0F2 0F3 1F0 1F1\n"
    schedule = from_text("x microbatches=4 stages=0/1,1/0\n" + rows)
    programs, windows = lower(schedule, prefetch=0), send_windows(schedule, prefetch=0)
    check_programs(schedule, programs)
    check_programs(schedule, programs, windows)
    with pytest.raises(ScheduleError, match=r"rank 0, .*deadlock; also stuck: rank 1 at send\(1a3>0\)"):
        check_programs(schedule, programs, dict.fromkeys(windows, 1))


@settings(max_examples=40, deadline=None)
@given(st.data(), schedules(ranks=6, microbatches=12).filter(lambda s: s.placement.num_ranks > 1))
def test_any_message_dropped_or_doubled_is_found(data: st.DataObject, schedule: Schedule) -> None:
    programs = lower(schedule)
    places = [
        (rank, index)
        for rank, program in enumerate(programs)
        for index, instruction in enumerate(program)
        if isinstance(instruction, Send | Receive)
    ]
    rank, index = data.draw(st.sampled_from(places))
    row = programs[rank]
    for changed in (row[:index] + row[index + 1 :], row[:index] + (row[index],) + row[index:]):
        with pytest.raises(ScheduleError):
            check_programs(schedule, (*programs[:rank], changed, *programs[rank + 1 :]))


@settings(max_examples=40, deadline=None)
@given(st.data(), schedules(ranks=6, microbatches=12).filter(lambda s: s.placement.num_microbatches > 1))
def test_receives_in_another_order_than_the_sends_are_found(data: st.DataObject, schedule: Schedule) -> None:
    programs = lower(schedule)
    pairs = [
        (rank, i, j)
        for rank, program in enumerate(programs)
        for i, j in combinations(_receives(program), 2)
        if link_of(program[i].message) == link_of(program[j].message)
    ]
    if not pairs:
        return
    rank, i, j = data.draw(st.sampled_from(pairs))
    row = list(programs[rank])
    row[i], row[j] = row[j], row[i]
    with pytest.raises(ScheduleError):
        check_programs(schedule, (*programs[:rank], tuple(row), *programs[rank + 1 :]))


def _receives(program: Program) -> list[int]:
    return [index for index, instruction in enumerate(program) if isinstance(instruction, Receive)]
