"""DualPipe against the eight steps as published, and against what must hold for every size."""

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given, settings

from deepseek_train.schedule.action import Action, Pair
from deepseek_train.schedule.dataflow import Message, actions_of, inputs_of, outputs_of
from deepseek_train.schedule.dualpipe import dualpipe, mirrored
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.lower import Instruction, Program, Receive, Send, lower
from deepseek_train.schedule.text import to_text
from deepseek_train.schedule.windows import send_windows
from tests.paper.schedules import dualpipe_sizes

# Written by hand from the table of the eight steps: P=4, M=8, one line for each step number.
RANK_0_OF_4 = """
0F0 0F1
0F2 3F4
3I4 3W4 3F5
0F3&3B5 3F6&0B0
3B6 3F7&0B1
3B7 0I2
0W2 0I3
0W3
"""
RANK_1_OF_4 = """

1F0 2F4 1F1 2F5

1F2 2B4 2F6&1B0 1F3&2B5 2F7&1B1

2B6 1B2 2I7 1I3

2W7 1W3
"""


def test_rows_equal_the_published_steps() -> None:
    rows = to_text(dualpipe(4, 8)).splitlines()[1:]
    assert rows[0].split()[2:] == RANK_0_OF_4.split()
    assert rows[1].split()[2:] == RANK_1_OF_4.split()


def test_the_input_only_switch_of_step_six_on_a_rank_at_even_and_odd_distance() -> None:
    """Distance 2: the switch is before the B0 of iteration 1; distance 3: before the B1 of iteration 2."""
    kinds = {rank: "".join(_letters(dualpipe(8, 20).steps_R[rank])) for rank in (2, 3)}
    assert kinds[2].endswith("BBBIII" + "WI" + "WWW")
    assert kinds[3].endswith("BBBBIIII" + "WWWW")


@settings(max_examples=20, deadline=None)
@given(dualpipe_sizes())
def test_the_second_half_of_the_ranks_mirrors_the_first(sizes: tuple[int, int]) -> None:
    num_ranks, num_microbatches = sizes
    schedule = dualpipe(num_ranks, num_microbatches)

    def mirror(action: Action) -> Action:
        microbatch = (action.microbatch + num_microbatches // 2) % num_microbatches
        return Action(action.stage, action.kind, microbatch)

    for rank in range(num_ranks):
        mirrored_row = [
            tuple(map(mirror, actions_of(step))) for step in schedule.steps_R[num_ranks - 1 - rank]
        ]
        assert [actions_of(step) for step in schedule.steps_R[rank]] == mirrored_row


@settings(max_examples=20, deadline=None)
@given(dualpipe_sizes(microbatches=40))
def test_mirrored_ranks_run_the_same_stages_in_the_same_order(sizes: tuple[int, int]) -> None:
    """So that the exchanges of a layer meet where mirrored ranks share its experts: in training and in evaluation,
    sends and receives included, all of it for the other direction."""
    num_ranks, num_microbatches = sizes

    def seen(program: Program, *, mirror: bool) -> list[object]:
        """Receives posted before one step, in any order; the stages of a step; sends, one by one."""
        groups = groupby(program, lambda i: type(i) if isinstance(i, Send | Receive) else None)
        return [
            {message(i.message, mirror) for i in run if isinstance(i, Receive)}
            if kind is Receive
            else [work(i, mirror) for i in run]
            for kind, run in groups
        ]

    def work(instruction: Instruction, mirror: bool) -> object:
        match instruction:
            case Send(m) | Receive(m):
                return message(m, mirror)
            case _:
                return [(action.kind, action.stage) for action in actions_of(instruction)]

    def message(m: Message, mirror: bool) -> Message:
        if not mirror:
            return m
        microbatch = (m.microbatch + num_microbatches // 2) % num_microbatches
        return Message(m.kind, m.stage, microbatch, num_ranks - 1 - m.source, num_ranks - 1 - m.target)

    for schedule in (dualpipe(*sizes), forward_only(mirrored(*sizes))):
        programs = lower(schedule)
        for program, other in zip(programs, reversed(programs), strict=True):
            assert seen(program, mirror=False) == seen(other, mirror=True)
        windows, last = send_windows(schedule), num_ranks - 1
        assert windows == {(last - s, last - t, kind): n for (s, t, kind), n in windows.items()}


@settings(max_examples=20, deadline=None)
@given(dualpipe_sizes())
def test_mirrored_ranks_that_wait_for_each_other_reach_their_ends(sizes: tuple[int, int]) -> None:
    """Sharing experts they do, in every step: it begins on both once both have what it needs, and ends on both."""
    for schedule in (dualpipe(*sizes), forward_only(mirrored(*sizes))):
        placement, steps_R, made = schedule.placement, schedule.steps_R, set[Message]()
        half = len(steps_R) // 2
        left = [
            list(zip(row, mirror, strict=True))[::-1]
            for row, mirror in zip(steps_R[:half], steps_R[: half - 1 : -1], strict=True)
        ]
        while any(left):
            before = sum(map(len, left))
            for both in left:
                while both and all(m in made for step in both[-1] for m in inputs_of(placement, step)):
                    made.update(m for step in both.pop() for m in outputs_of(placement, step))
            assert sum(map(len, left)) < before, "deadlock"


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_a_pair_overlaps_the_two_directions(num_ranks: int) -> None:
    for row in dualpipe(num_ranks, 3 * num_ranks).steps_R:
        pairs = [step for step in row if isinstance(step, Pair)]
        assert all(pair.forward.stage == num_ranks - 1 - pair.backward.stage for pair in pairs)
        assert Counter(_letters(row))["F"] == 3 * num_ranks


def test_overlapped_pairs_of_the_published_run() -> None:
    """16 stages, 120 micro-batches: 97 pairs on the end ranks, 103 on the middle ones."""
    counts = [sum(isinstance(step, Pair) for step in row) for row in dualpipe(16, 120).steps_R]
    half = [97, 98, 99, 100, 101, 102, 103, 103]
    assert counts == half + half[::-1]


@pytest.mark.parametrize(
    ("sizes", "mend"),
    [((3, 12), "use 2 or 4 ranks"), ((1, 4), "use 2 ranks"), ((4, 9), "use 10"), ((8, 14), "use 16 or more")],
)
def test_sizes_it_cannot_run_are_refused_with_a_mend(sizes: tuple[int, int], mend: str) -> None:
    with pytest.raises(ValueError, match=mend):
        dualpipe(*sizes)


def test_the_placement_alone_asks_only_for_even_numbers() -> None:
    assert mirrored(4, 2).ranks_SX == ((0, 3), (1, 2), (2, 1), (3, 0))
    assert [mirrored(4, 2).rank_of(0, microbatch) for microbatch in (0, 1)] == [0, 3]
    with pytest.raises(ValueError, match="even number of them, got 3: use 4"):
        mirrored(4, 3)


def _letters(row: tuple[Action | Pair, ...]) -> list[str]:
    return [action.kind.value for step in row for action in actions_of(step)]
