"""Programs under NCCL's rule: a rank has one queue for each process group, and what is in a queue happens in turn.

A pipeline has four groups: activations and gradients, to higher ranks and to lower ranks. A send or a receive blocks
all behind it in its queue until the peer's queue has come to the same message.
"""

from collections import defaultdict, deque

import pytest

from deepseek_train.schedule.action import Action, Pair, Schedule
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.dataflow import Message, MessageKind, inputs_of
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.schedule.lower import Instruction, Link, Receive, Send, link_of, lower, sends_in_flight

MICROBATCHES = {
    **{("dualpipe", ranks): range(2 * ranks, 33, 2) for ranks in (2, 4, 8)},
    **{("1f1b", ranks): range(1, 33) for ranks in (2, 4, 8)},
}


class Machine:
    """A schedule's programs in execution. Nothing that can happen is ever undone, so one order stands for all."""

    def __init__(self, schedule: Schedule, prefetch: int = 1) -> None:
        self.placement = schedule.placement
        self.programs = lower(schedule, prefetch=prefetch)
        self.windows = sends_in_flight(schedule, prefetch=prefetch)
        self.done_R = [0] * len(self.programs)
        self.queues: defaultdict[tuple[int, bool, MessageKind], deque[Message]] = defaultdict(deque)
        self.sending: defaultdict[Link, deque[Message]] = defaultdict(deque)
        self.passed: set[Message] = set()

    def run(self) -> list[str]:
        """To the end, or until nobody can go on: what then stands in the way."""
        while self._meet() or any(self._advance(rank) for rank in range(len(self.programs))):
            pass
        programs = zip(self.done_R, self.programs, strict=True)
        stuck = [f"rank {r} at {p[done]}" for r, (done, p) in enumerate(programs) if done < len(p)]
        return stuck + [f"rank {r}: {queue[0]}" for (r, _, _), queue in self.queues.items() if queue]

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
        self.queues[rank, message.target > message.source, message.kind].append(message)
        return True

    def _meet(self) -> bool:
        """Messages that are first in both their queues pass."""
        met = False
        for (rank, rises, kind), queue in list(self.queues.items()):
            while queue and rank == queue[0].source:
                other = self.queues[queue[0].target, rises, kind]
                if not other or other[0] != queue[0]:
                    break
                self.passed.add(queue.popleft())
                other.popleft()
                met = True
        return met


@pytest.mark.parametrize(("name", "ranks"), MICROBATCHES)
def test_queues_never_block_for_good(name: str, ranks: int) -> None:
    for count in MICROBATCHES[name, ranks]:
        training = make_schedule(name, ranks, count)
        for schedule in (training, forward_only(training.placement)):
            assert Machine(schedule).run() == [], count


@pytest.mark.parametrize(("name", "prefetch"), [("dualpipe", 2), ("1f1b", 2)])
def test_they_would_with_another_prefetch(name: str, prefetch: int) -> None:
    """A receive posted too early stands before the send that lets its sender go on."""
    schedule = make_schedule(name, 4, 8)
    assert Machine(schedule, prefetch).run() != []
