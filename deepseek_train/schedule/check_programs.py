"""Prove that programs with explicit messages (``lower``) can be executed and carry out their schedule."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest

from deepseek_train.schedule.action import Action, Pair, Placement, Schedule, Step
from deepseek_train.schedule.dataflow import Message, inputs_of, outputs_of
from deepseek_train.schedule.faults import fault
from deepseek_train.schedule.lower import Link, Program, Receive, Send, link_of
from deepseek_train.schedule.replay import replay


def check_programs(
    schedule: Schedule, programs: tuple[Program, ...], windows: Mapping[Link, int] | None = None
) -> None:
    """Raise ``ScheduleError`` unless ``programs`` carry out ``schedule``. What is proved:

    - a rank runs its row of the schedule, in order;
    - a step finds its receives posted before it, each once and used; its outputs are sent after it, each once;
    - on every link the k-th message sent is the k-th received;
    - with senders that wait once ``windows`` of their sends are outstanding (None: without limit), in whatever order
      the ranks proceed, all reach the end.
    """
    ends: dict[str, defaultdict[Link, list[tuple[int, Message]]]] = {}
    ends = {"sends": defaultdict(list), "receives": defaultdict(list)}
    for rank, (row, program) in enumerate(zip(schedule.steps_R, programs, strict=True)):
        account = _Account(schedule.placement, rank, row)
        for index, instruction in enumerate(program):
            match instruction:
                case Send(message):
                    problem = account.send(message)
                    ends["sends"][link_of(message)].append((index, message))
                case Receive(message):
                    problem = account.receive(message)
                    ends["receives"][link_of(message)].append((index, message))
                case Action() | Pair():
                    problem = account.run(instruction)
            if problem:
                raise fault(schedule.name, rank, program, index, problem)
        if missing := account.missing():
            raise fault(schedule.name, rank, program, len(program), missing)
    for link in ends["sends"].keys() | ends["receives"].keys():
        _check_order(schedule.name, link, ends["sends"][link], ends["receives"][link], programs)
    unlimited = {link: len(sends) for link, sends in ends["sends"].items()}
    stuck = replay(schedule.placement, programs, unlimited if windows is None else windows)
    for rank, index in stuck.items():
        others = ", ".join(f"rank {r} at {programs[r][i]}" for r, i in stuck.items() if r != rank)
        raise fault(schedule.name, rank, programs[rank], index, f"deadlock; also stuck: {others or 'nobody'}")


class _Account:
    """What one rank still has to do, and what it has at hand."""

    def __init__(self, placement: Placement, rank: int, row: tuple[Step, ...]) -> None:
        self.placement = placement
        self.rank = rank
        self.row = row
        self.done = 0
        self.received: set[Message] = set()
        self.to_send: set[Message] = set()

    def send(self, message: Message) -> str:
        """What is wrong with it; empty: nothing."""
        if message.source != self.rank:
            return f"the {message} is not this rank's to send"
        if message not in self.to_send:
            return f"the {message} is sent before it is made, or twice"
        self.to_send.remove(message)
        return ""

    def receive(self, message: Message) -> str:
        if message.target != self.rank:
            return f"the {message} goes to rank {message.target}"
        if message in self.received:
            return f"the {message} is received twice"
        self.received.add(message)
        return ""

    def run(self, step: Step) -> str:
        if self.done == len(self.row) or step != self.row[self.done]:
            due = self.row[self.done] if self.done < len(self.row) else "nothing more"
            return f"{step} runs where the schedule has {due}"
        for message in inputs_of(self.placement, step):
            if not message.is_local and message not in self.received:
                return f"{step} needs the {message}, whose receive is not posted before it"
            self.received.discard(message)
        self.to_send.update(m for m in outputs_of(self.placement, step) if not m.is_local)
        self.done += 1
        return ""

    def missing(self) -> str:
        if self.done < len(self.row):
            return f"{self.row[self.done]} is missing"
        for message in self.to_send:
            return f"the {message} is never sent"
        for message in self.received:
            return f"the {message} is received but never used"
        return ""


def _check_order(
    name: str,
    link: Link,
    sends: list[tuple[int, Message]],
    receives: list[tuple[int, Message]],
    programs: tuple[Program, ...],
) -> None:
    source, target, _ = link
    for sent, received in zip_longest(sends, receives):
        if sent is None:
            raise fault(name, target, programs[target], received[0], f"nothing is sent for {received[1]}")
        if received is None:
            raise fault(
                name, source, programs[source], sent[0], f"rank {target} never receives the {sent[1]}"
            )
        if sent[1] != received[1]:
            problem = f"receives the {received[1]} where rank {source} sends the {sent[1]}"
            raise fault(name, target, programs[target], received[0], problem)
