"""Run lowered programs on paper, under the harshest rules: links are first-in-first-out, a send completes only once
its receive is posted, and a sender that has as many sends under way as its window allows waits for the oldest.

Nothing that can happen is ever undone, and what a rank does next never depends on when: where one order of
execution reaches the end all do. So one run is a proof.
"""

from collections import defaultdict, deque
from collections.abc import Mapping

from deepseek_train.schedule.action import Action, Pair, Placement
from deepseek_train.schedule.dataflow import Message, inputs_of, outputs_of
from deepseek_train.schedule.lower import Instruction, Link, Program, Receive, Send, link_of


def replay(
    placement: Placement, programs: tuple[Program, ...], windows: Mapping[Link, int]
) -> dict[int, int]:
    """For each rank that cannot go on for ever, the index of the instruction it is stuck at; empty: all reach the
    end. ``windows`` names every link; 0 counts as 1, as in ``parallel.p2p.Links``.
    """
    machine = _Machine(placement, windows)
    done_R = [0] * len(programs)
    runnable = deque(range(len(programs)))
    while runnable:
        rank = runnable.popleft()
        program = programs[rank]
        while done_R[rank] < len(program):
            obstacle = machine.obstacle(program[done_R[rank]])
            if obstacle is not None:
                machine.waiting[obstacle].append(rank)
                break
            runnable.extend(machine.perform(program[done_R[rank]]))
            done_R[rank] += 1
    return {rank: done for rank, done in enumerate(done_R) if done < len(programs[rank])}


_Event = tuple[
    str, Message | Link, int
]  # ("sent", message, 0), ("made", message, 0), ("posted", link, how many)


class _Machine:
    """What has been sent and posted. A waiting rank names the event that lets it go on."""

    def __init__(self, placement: Placement, windows: Mapping[Link, int]) -> None:
        self.placement = placement
        self.windows = windows
        self.sent: defaultdict[Link, int] = defaultdict(int)
        self.posted: defaultdict[Link, int] = defaultdict(int)
        self.happened: set[_Event] = set()
        self.waiting: defaultdict[_Event, list[int]] = defaultdict(list)

    def obstacle(self, instruction: Instruction) -> _Event | None:
        """The event ``instruction`` still has to wait for, if any."""
        needed: list[_Event] = []
        match instruction:
            case Send(message):
                link = link_of(message)
                oldest = self.sent[link] + 1 - max(1, self.windows[link])
                needed = [("posted", link, oldest)] if oldest > 0 else []
            case Receive():
                pass
            case Action() | Pair():
                messages = inputs_of(self.placement, instruction)
                needed = [("made" if m.is_local else "sent", m, 0) for m in messages]
        return next((event for event in needed if event not in self.happened), None)

    def perform(self, instruction: Instruction) -> list[int]:
        """Do it. Returns the ranks that waited for it."""
        events: list[_Event] = []
        match instruction:
            case Send(message):
                self.sent[link_of(message)] += 1
                events = [("sent", message, 0)]
            case Receive(message):
                link = link_of(message)
                self.posted[link] += 1
                events = [("posted", link, self.posted[link])]
            case Action() | Pair():
                events = [("made", m, 0) for m in outputs_of(self.placement, instruction) if m.is_local]
        self.happened.update(events)
        return [rank for event in events for rank in self.waiting.pop(event, [])]
