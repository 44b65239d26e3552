"""Programs with explicit messages, executed under the harshest rules: a send completes only once its receive
is posted, links are first-in-first-out, ranks proceed in any order.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Action, Pair, Placement, Schedule
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.check import ScheduleError, check
from deepseek_train.schedule.dataflow import (
    Deadlock,
    Message,
    MessageKind,
    dependency_order,
    inputs_of,
    outputs_of,
)
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.lower import Link, Program, Receive, Send, link_of, lower, sends_in_flight
from deepseek_train.schedule.text import from_text
from tests.paper.schedules import V_PLACEMENT, schedules, training_schedules

DOWN: Link = (0, 1, MessageKind.ACTIVATION)


@dataclass
class Links:
    """What ranks share: messages sent and receives posted, in order, and what windows limit."""

    window: dict[Link, int] | None = None
    sent: defaultdict[Link, list[Message]] = field(default_factory=lambda: defaultdict(list))
    posted: defaultdict[Link, list[Message]] = field(default_factory=lambda: defaultdict(list))
    local: set[Message] = field(default_factory=set)
    most_pending: defaultdict[Link, int] = field(default_factory=lambda: defaultdict(int))

    def arrived(self, message: Message) -> bool:
        """Both ends have reached ``message``. They must agree on what is in its place on the link."""
        if message.is_local:
            return message in self.local
        link = link_of(message)
        if message not in self.posted[link] or message not in self.sent[link]:
            return False
        assert self.posted[link].index(message) == self.sent[link].index(message)
        return True

    def send(self, message: Message) -> bool:
        """False: the window is full and the oldest send has to complete first."""
        link = link_of(message)
        pending = len(self.sent[link]) - len(self.posted[link])
        if self.window is not None and pending >= self.window[link]:
            return False
        self.sent[link].append(message)
        self.most_pending[link] = max(self.most_pending[link], pending + 1)
        return True

    def perform(self, placement: Placement, instruction: Send | Receive | Action | Pair) -> bool:
        """Do one instruction; False: it has to wait."""
        match instruction:
            case Send(message):
                return self.send(message)
            case Receive(message):
                self.posted[link_of(message)].append(message)
                return True
            case Action() | Pair():
                if not all(self.arrived(message) for message in inputs_of(placement, instruction)):
                    return False
                self.local.update(m for m in outputs_of(placement, instruction) if m.is_local)
                return True


def execute(
    schedule: Schedule,
    programs: tuple[Program, ...],
    order: random.Random,
    links: Links,
    hurried: int | None = None,
) -> None:
    """Run to the end in a random order; ``hurried`` goes on whenever it can. Fails when nobody can."""
    done = [0] * len(programs)
    while any(count < len(program) for count, program in zip(done, programs, strict=True)):
        ranks = [rank for rank, program in enumerate(programs) if done[rank] < len(program)]
        order.shuffle(ranks)
        ranks.sort(key=lambda rank: rank != hurried)
        for rank in ranks:
            if links.perform(schedule.placement, programs[rank][done[rank]]):
                done[rank] += 1
                break
        else:
            raise AssertionError(f"deadlock at {[str(programs[rank][done[rank]]) for rank in ranks]}")


def small_schedules() -> st.SearchStrategy[Schedule]:
    """Small enough to execute instruction by instruction."""
    return st.one_of(schedules(ranks=6, microbatches=12), st.just(forward_only(V_PLACEMENT)))


@settings(max_examples=40, deadline=None)
@given(small_schedules(), st.integers(0, 4), st.randoms(use_true_random=False))
def test_programs_run_to_the_end_in_any_order(
    schedule: Schedule, prefetch: int, order: random.Random
) -> None:
    links = Links()
    execute(schedule, lower(schedule, prefetch=prefetch), order, links)
    assert links.sent == links.posted


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 2), st.randoms(use_true_random=False))
def test_what_the_checker_accepts_runs(data: st.DataObject, half_ranks: int, order: random.Random) -> None:
    """Two steps of a row change places: either ``check`` refuses or the programs still reach the end."""
    schedule = make_schedule("dualpipe", 2 * half_ranks, 4 * half_ranks)
    rows = [list(row) for row in schedule.steps_R]
    row = data.draw(st.sampled_from(rows))
    i = data.draw(st.integers(0, len(row) - 2))
    j = data.draw(st.integers(i + 1, min(i + 4, len(row) - 1)))
    row[i], row[j] = row[j], row[i]
    changed = Schedule("changed", schedule.placement, tuple(map(tuple, rows)))
    try:
        check(changed)
    except ScheduleError:
        return
    execute(changed, lower(changed), order, Links())


@settings(max_examples=30, deadline=None)
@given(small_schedules(), st.integers(0, 3), st.randoms(use_true_random=False), st.integers(0, 5))
def test_waiting_for_old_sends_is_safe(
    schedule: Schedule, prefetch: int, order: random.Random, hurried: int
) -> None:
    """Without a window no more are ever outstanding than promised, so a window of that size never blocks."""
    promised = sends_in_flight(schedule, prefetch=prefetch)
    links = Links()
    execute(schedule, lower(schedule, prefetch=prefetch), order, links, hurried)
    assert all(links.most_pending[link] <= promised[link] for link in promised)
    assert set(links.most_pending) == set(promised)
    execute(schedule, lower(schedule, prefetch=prefetch), order, Links(window=promised))


def test_the_promise_on_sends_is_reached() -> None:
    """1F1B: rank 0 may warm up before rank 1 has begun."""
    schedule = make_schedule("1f1b", 4, 8)
    links = Links()
    execute(schedule, lower(schedule), random.Random(0), links, hurried=0)
    assert links.most_pending[DOWN] == sends_in_flight(schedule)[DOWN] == 4


@settings(max_examples=30, deadline=None)
@given(schedules(), st.integers(0, 4))
def test_both_ends_of_a_link_agree_and_every_message_passes_once(schedule: Schedule, prefetch: int) -> None:
    sent, posted = defaultdict(list), defaultdict(list)
    for rank, program in enumerate(lower(schedule, prefetch=prefetch)):
        for instruction in program:
            match instruction:
                case Send(message):
                    assert message.source == rank
                    sent[link_of(message)].append(message)
                case Receive(message):
                    assert message.target == rank
                    posted[link_of(message)].append(message)
                case _:
                    pass
    assert sent == posted
    messages = [message for link in sent.values() for message in link]
    steps = [step for row in schedule.steps_R for step in row]
    needed = [m for step in steps for m in inputs_of(schedule.placement, step) if not m.is_local]
    assert len(messages) == len(set(messages))
    assert set(messages) == set(needed)


@settings(max_examples=30, deadline=None)
@given(schedules(), st.integers(0, 4))
def test_steps_are_untouched_and_sends_follow_at_once(schedule: Schedule, prefetch: int) -> None:
    for row, program in zip(schedule.steps_R, lower(schedule, prefetch=prefetch), strict=True):
        assert tuple(i for i in program if isinstance(i, Action | Pair)) == row
        for previous, instruction in pairwise(program):
            if isinstance(instruction, Send):
                assert isinstance(previous, Send | Action | Pair)


@settings(max_examples=40, deadline=None)
@given(schedules(ranks=8, microbatches=20), st.integers(0, 4))
def test_receives_are_posted_in_time_and_not_hoarded(schedule: Schedule, prefetch: int) -> None:
    """Posted ``prefetch`` steps ahead of the use, or right after the last of the rank's own steps the message depends
    on; at most 2 (prefetch + 1) waiting, for any P and M.
    """
    for program in lower(schedule, prefetch=prefetch):
        waiting: dict[Message, int] = {}
        index = 0
        for instruction in program:
            match instruction:
                case Receive(message):
                    waiting[message] = index
                    assert len(waiting) <= 2 * (prefetch + 1)
                case Action() | Pair():
                    for message in inputs_of(schedule.placement, instruction):
                        if not message.is_local:
                            posted = waiting.pop(message)
                            early_enough = posted <= max(0, index - prefetch)
                            assert early_enough or _depends(schedule, message, posted - 1)
                    index += 1
                case Send():
                    pass
        assert not waiting


def _depends(schedule: Schedule, message: Message, index: int) -> bool:
    """Without step ``index`` of its target's row ``message`` is never made."""
    cut = schedule.steps_R[message.target][:index]
    rows = (*schedule.steps_R[: message.target], cut, *schedule.steps_R[message.target + 1 :])
    made: set[Message] = set()
    try:
        for rank, done in dependency_order(Schedule("cut", schedule.placement, rows)):
            made.update(outputs_of(schedule.placement, rows[rank][done]))
    except Deadlock:
        pass  # what could be made has been
    return message not in made


@settings(max_examples=30, deadline=None)
@given(training_schedules(microbatches=40).filter(lambda schedule: schedule.name != "gpipe"))
def test_outstanding_sends_do_not_grow_with_the_number_of_microbatches(schedule: Schedule) -> None:
    placement = schedule.placement
    stages = max(placement.num_stages, 2 * placement.num_ranks - 1)  # interleaved groups have at most 2 P - 1
    assert all(count <= stages for count in sends_in_flight(schedule).values())


def test_a_receive_is_posted_early_where_a_later_message_on_its_link_is_needed_first() -> None:
    """Rank 1 takes the micro-batches the other way round: both receives precede its first step, in order."""
    schedule = from_text("x microbatches=2 stages=0,1\nrank 0: 0F0 0F1\nrank 1: 1F1 1F0\n")
    receives = [Receive(Message(MessageKind.ACTIVATION, 1, m, source=0, target=1)) for m in (0, 1)]
    assert lower(schedule, prefetch=0)[1] == (*receives, *schedule.steps_R[1])


def test_neighbouring_stages_on_one_rank_need_no_message() -> None:
    programs = lower(forward_only(V_PLACEMENT))
    assert {i.message.stage for program in programs for i in program if isinstance(i, Send)} == {1, 3}


def test_a_negative_prefetch_is_refused() -> None:
    with pytest.raises(ValueError, match="got -1: use 0 or more"):
        lower(make_schedule("1f1b", 2, 2), prefetch=-1)
