"""Programs under NCCL's rule: what is in a queue happens in turn.

A pipeline has two process groups, messages to higher ranks and messages to lower ranks, and every rank has one
queue for each. A send or a receive blocks all behind it in its queue until the peer's queue has come to the same
message. A schedule without deadlock can still block there, so searches ask here before they trust one.
"""

from collections import defaultdict, deque

from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.dataflow import Message, inputs_of
from deepseek_train.schedule.lower import Instruction, Link, Receive, Send, lower, sends_in_flight


def blocked(schedule: Schedule, *, prefetch: int = 1) -> list[str]:
    """What stands still for ever when ``schedule``, which has passed ``check``, is lowered and executed with
    in-order queues; empty: nothing.
    """
    machine = _Machine(schedule, prefetch)
    while machine.meet() or sum(machine.advance(rank) for rank in range(len(machine.programs))):
        pass
    return machine.remains()


class _Machine:
    """Nothing that can happen is ever undone, so one order of execution stands for all."""

    def __init__(self, schedule: Schedule, prefetch: int) -> None:
        self.placement = schedule.placement
        self.programs = lower(schedule, prefetch=prefetch)
        self.windows = sends_in_flight(schedule, prefetch=prefetch)
        self.done_R = [0] * len(self.programs)
        self.queues: defaultdict[tuple[int, bool], deque[Message]] = defaultdict(deque)
        self.under_way: defaultdict[Link, deque[Message]] = defaultdict(deque)
        self.passed: set[Message] = set()

    def advance(self, rank: int) -> bool:
        """Let ``rank`` go on until it has to wait. Returns whether it did anything."""
        start, program = self.done_R[rank], self.programs[rank]
        while self.done_R[rank] < len(program) and self._perform(rank, program[self.done_R[rank]]):
            self.done_R[rank] += 1
        return self.done_R[rank] > start

    def meet(self) -> bool:
        """Messages that are first in both their queues pass. Returns whether any did."""
        met = False
        for (rank, rises), queue in list(self.queues.items()):
            while queue and rank == queue[0].source:
                other = self.queues[queue[0].target, rises]
                if not other or other[0] != queue[0]:
                    break
                self.passed.add(queue.popleft())
                other.popleft()
                met = True
        return met

    def remains(self) -> list[str]:
        programs = zip(self.done_R, self.programs, strict=True)
        stuck = [f"rank {r} at {p[done]}" for r, (done, p) in enumerate(programs) if done < len(p)]
        return stuck + [f"rank {r}: {queue[0]}" for (r, _), queue in self.queues.items() if queue]

    def _perform(self, rank: int, instruction: Instruction) -> bool:
        """Start ``instruction``; False: it has to wait. A full window waits for its oldest send, as the executor's
        links do.
        """
        match instruction:
            case Send(message):
                window = self.under_way[message.source, message.target]
                while window and len(window) >= self.windows[message.source, message.target]:
                    if window[0] not in self.passed:
                        return False
                    window.popleft()
                window.append(message)
            case Receive(message):
                pass
            case step:
                return all(m.is_local or m in self.passed for m in inputs_of(self.placement, step))
        self.queues[rank, message.target > message.source].append(message)
        return True
