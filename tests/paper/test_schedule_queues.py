"""Programs under NCCL's rule: a rank has one queue for each process group, and what is in a queue happens in turn.

A send or a receive blocks all behind it in its queue until the peer's queue has come to the same message. Which
messages share a queue says ``lower.queue_of``.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable

import pytest

from deepseek_train.schedule.action import Action, Pair, Schedule
from deepseek_train.schedule.catalog import NAMES, make_schedule, problems
from deepseek_train.schedule.dataflow import Message, inputs_of
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.lower import Instruction, Link, Receive, Send, link_of, lower, queue_of
from deepseek_train.schedule.windows import send_windows

RANKS = (2, 3, 4, 8)
Queue = Hashable


def as_built(message: Message) -> Queue:
    """As ``parallel.p2p`` has it."""
    return queue_of(message.kind, message.source, message.target)


def direction(message: Message) -> Queue:
    """One queue for all of one kind that goes up, one for all that goes down."""
    return message.kind, message.target > message.source


class Machine:
    """A schedule's programs in execution. Nothing that can happen is ever undone, so one order stands for all."""

    def __init__(
        self, schedule: Schedule, prefetch: int = 1, queue_of: Callable[[Message], Queue] = as_built
    ) -> None:
        self.placement = schedule.placement
        self.queue_of = queue_of
        self.programs = lower(schedule, prefetch=prefetch)
        self.windows = send_windows(schedule, prefetch=prefetch)
        self.done_R = [0] * len(self.programs)
        self.queues: defaultdict[tuple[int, Queue], deque[Message]] = defaultdict(deque)
        self.sending: defaultdict[Link, deque[Message]] = defaultdict(deque)
        self.passed: set[Message] = set()

    def run(self) -> list[str]:
        """To the end, or until nobody can go on: what then stands in the way."""
        while self._meet() or any(self._advance(rank) for rank in range(len(self.programs))):
            pass
        programs = zip(self.done_R, self.programs, strict=True)
        stuck = [f"rank {r} at {p[done]}" for r, (done, p) in enumerate(programs) if done < len(p)]
        return stuck + [f"rank {r}: {queue[0]}" for (r, _), queue in self.queues.items() if queue]

    def _advance(self, rank: int) -> bool:
        start = self.done_R[rank]
        while self.done_R[rank] < len(self.programs[rank]):
            if not self._perform(rank, self.programs[rank][self.done_R[rank]]):
                break
            self.done_R[rank] += 1
        return self.done_R[rank] > start

    def _perform(self, rank: int, instruction: Instruction) -> bool:
        """False: it has to wait. Sends wait for the oldest on their link as ``parallel.p2p.Links`` does."""
        match instruction:
            case Action() | Pair():
                needed = inputs_of(self.placement, instruction)
                return all(m.is_local or m in self.passed for m in needed)
            case Send(message):
                under_way = self.sending[link_of(message)]
                while under_way and len(under_way) >= self.windows[link_of(message)]:
                    if under_way[0] not in self.passed:
                        return False
                    under_way.popleft()
                under_way.append(message)
            case Receive(message):
                pass
        self.queues[rank, self.queue_of(message)].append(message)
        return True

    def _meet(self) -> bool:
        """Messages that are first in both their queues pass."""
        met = False
        for (rank, name), queue in list(self.queues.items()):
            while queue and rank == queue[0].source:
                other = self.queues[queue[0].target, name]
                if not other or other[0] != queue[0]:
                    break
                self.passed.add(queue.popleft())
                other.popleft()
                met = True
        return met


def _stuck(name: str, ranks: int, queue_of: Callable[[Message], Queue]) -> list[tuple[str, int]]:
    found = []
    for count in (*range(1, 2 * ranks + 2), *range(2 * ranks + 2, 24, 3)):
        if problems(name, ranks, count):
            continue
        training = make_schedule(name, ranks, count)
        for schedule in (training, forward_only(training.placement)):
            if Machine(schedule, queue_of=queue_of).run():
                found.append((schedule.name, count))
    return found


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_queues_never_block_for_good(name: str, ranks: int) -> None:
    assert _stuck(name, ranks, as_built) == []


def test_a_ring_would_block_if_ranks_sent_and_received_in_one_queue() -> None:
    """Interleaved 1F1B links the last rank with the first: 8 ranks with 2 to 6 micro-batches."""
    stuck = {count for _, count in _stuck("interleaved_1f1b", 8, direction)}
    assert stuck == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("prefetch", [0, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_nor_with_another_prefetch(name: str, prefetch: int) -> None:
    assert Machine(make_schedule(name, 4, 8), prefetch).run() == []


@pytest.mark.parametrize("name", ["dualpipe", "1f1b"])
def test_a_receive_posted_early_would_block_sends_of_its_own_queue(name: str) -> None:
    assert Machine(make_schedule(name, 4, 8), 2, direction).run() != []
