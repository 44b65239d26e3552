"""Programs under NCCL's rule: a rank has one queue for each process group, and what is in a queue happens in turn.

A pipeline has two groups, messages to higher ranks and messages to lower ranks. A send or a receive blocks all
behind it in its queue until the peer's queue has come to the same message.

Interleaved 1F1B also links the last rank with the first. Where that link shares the two queues with those of the
neighbours some sizes block for good (M from 2 to P-2, and some M that P does not divide): it needs a queue for each
pair of ranks and direction, which is what NCCL has where every pair has its own communicator.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable

import pytest

from deepseek_train.schedule.action import Action, Pair, Schedule
from deepseek_train.schedule.catalog import NAMES, make_schedule, problems
from deepseek_train.schedule.dataflow import Message, inputs_of
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.lower import Instruction, Receive, Send, lower
from deepseek_train.schedule.windows import send_windows

RANKS = (2, 3, 4, 8)
UNSHARED = [name for name in NAMES if name != "interleaved_1f1b"]
Queue = Hashable


def direction(message: Message) -> Queue:
    """Two queues a rank: up and down."""
    return message.target > message.source


def pair_and_direction(message: Message) -> Queue:
    """A queue for each link."""
    return message.source, message.target


class Machine:
    """A schedule's programs in execution. Nothing that can happen is ever undone, so one order stands for all."""

    def __init__(
        self, schedule: Schedule, prefetch: int = 1, queue_of: Callable[[Message], Queue] = direction
    ) -> None:
        self.placement = schedule.placement
        self.queue_of = queue_of
        self.programs = lower(schedule, prefetch=prefetch)
        self.windows = send_windows(schedule, prefetch=prefetch)
        self.done_R = [0] * len(self.programs)
        self.queues: defaultdict[tuple[int, Queue], deque[Message]] = defaultdict(deque)
        self.sending: defaultdict[tuple[int, int], deque[Message]] = defaultdict(deque)
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
                under_way = self.sending[message.source, message.target]
                while under_way and len(under_way) >= self.windows[message.source, message.target]:
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
@pytest.mark.parametrize("name", UNSHARED)
def test_queues_never_block_for_good(name: str, ranks: int) -> None:
    assert _stuck(name, ranks, direction) == []


@pytest.mark.parametrize("ranks", RANKS)
def test_a_ring_needs_a_queue_for_each_pair_of_ranks(ranks: int) -> None:
    assert _stuck("interleaved_1f1b", ranks, pair_and_direction) == []


def test_a_ring_in_two_queues_blocks_where_microbatches_do_not_fill_it() -> None:
    """What the module's text warns of: 8 ranks with 2 to 6, and with 21."""
    stuck = {count for _, count in _stuck("interleaved_1f1b", 8, direction)}
    assert stuck == {2, 3, 4, 5, 6, 21}


@pytest.mark.parametrize(("name", "prefetch"), [("dualpipe", 0), ("dualpipe", 2), ("1f1b", 2)])
def test_they_would_with_another_prefetch(name: str, prefetch: int) -> None:
    """A receive posted too early stands before the send that lets its sender go on, one posted too late behind."""
    schedule = make_schedule(name, 4, 8)
    assert Machine(schedule, prefetch).run() != []
