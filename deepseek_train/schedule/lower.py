"""From what to compute to what each rank executes: the same steps with every send and receive written out.

Every link (source rank -> target rank, activations or gradients) is one first-in-first-out channel. The receiver
posts its receives on a link in the order the sender sends on it, so messages need no tags. Activations and gradients
have links of their own because either half of a pair may be ready first. Sends stand right after the step that
produced the tensor; a running pair may start them sooner. A receive is posted
``prefetch`` steps before the step that uses it, or earlier where a message behind it on the link is needed
earlier; never earlier than that, so that buffers do not grow with the number of micro-batches, and never before
a send that its message depends on.
"""

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass

from deepseek_train.schedule.action import Schedule, Step
from deepseek_train.schedule.dataflow import Message, MessageKind, dependency_order, inputs_of, outputs_of


@dataclass(frozen=True)
class Send:
    """Start sending ``message``, if a running pair has not yet; do not wait for it."""

    message: Message

    def __str__(self) -> str:
        return f"send({_short(self.message)}>{self.message.target})"


@dataclass(frozen=True)
class Receive:
    """Post the receive of ``message``; the step that uses it waits for it."""

    message: Message

    def __str__(self) -> str:
        return f"receive({_short(self.message)}<{self.message.source})"


def _short(message: Message) -> str:
    """``2a0``: the activation of micro-batch 0 for stage 2; ``2g0`` its gradient."""
    return f"{message.stage}{message.kind.value[0]}{message.microbatch}"


Instruction = Step | Send | Receive
Program = tuple[Instruction, ...]
Link = tuple[int, int, MessageKind]  # source rank, target rank


Queue = tuple[MessageKind, bool, int]  # kind, towards higher ranks, parity of the source


def link_of(message: Message) -> Link:
    """The link ``message`` travels on."""
    return message.source, message.target, message.kind


def queue_of(kind: MessageKind, source: int, target: int) -> Queue:
    """Messages of one queue share a process group. What a rank sends and what it receives in one direction never do:
    a receive that waits may not stand before a send (NCCL works off a group's messages one after the other).
    """
    return kind, target > source, source % 2


def all_queues() -> tuple[Queue, ...]:
    """Every queue there can be, in one order on all ranks."""
    return tuple(
        (kind, rises, parity) for kind in MessageKind for rises in (True, False) for parity in (0, 1)
    )


def lower(schedule: Schedule, *, prefetch: int = 1) -> tuple[Program, ...]:
    """Programs, one for each rank. ``schedule`` has passed ``check``; ``prefetch`` >= 0 is in compute steps.

    Which messages a step uses and produces: ``inputs_of`` and ``outputs_of`` (messages between stages of one
    rank need no send). Executing the programs cannot deadlock, even where a send completes only once its
    receive is posted, as long as sends do not block the sender (see ``windows.send_windows``). Where a process group
    runs its sends and receives one after the other (NCCL), that holds with the groups of ``queue_of``
    (tests/paper/test_schedule_queues.py).
    """
    receives: defaultdict[tuple[int, int], list[Receive]] = defaultdict(list)
    for (_, target, _), messages in _posts(schedule, prefetch).items():
        for index, message in messages:
            receives[target, index].append(Receive(message))
    programs = []
    for rank, steps in enumerate(schedule.steps_R):
        program: list[Instruction] = []
        for index, step in enumerate(steps):
            program += receives[rank, index]
            program.append(step)
            program += [Send(m) for m in outputs_of(schedule.placement, step) if not m.is_local]
        programs.append(tuple(program))
    return tuple(programs)


def sends_in_flight(schedule: Schedule, *, prefetch: int = 1) -> dict[Link, int]:
    """For each link the most sends that can be outstanding (sent, receive not yet posted), however the ranks'
    speeds differ. A rank that keeps this many and waits for its oldest send before starting another waits
    only for a receive that is certain to have been posted: it never blocks on a later step of its peer.

    Bounded by the number of stages where backwards hold the sender back. A forward-only chain holds nothing
    back: there the first rank may run all its micro-batches ahead (see ``windows.send_windows``).
    """
    posts, finished = _posts(schedule, prefetch), _finished_before(schedule)
    most = {}
    for link, posted in posts.items():
        indices = [index for index, _ in posted]
        surely_posted = (bisect_left(indices, finished[message]) for _, message in posted)
        most[link] = max(sent - certain for sent, certain in enumerate(surely_posted, start=1))
    return most


def _posts(schedule: Schedule, prefetch: int) -> dict[Link, list[tuple[int, Message]]]:
    """For each link its messages in the order sent, each with the index of the target's step its receive
    precedes.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch counts steps ahead of the use, got {prefetch}: use 0 or more")
    placement = schedule.placement
    used_at: dict[Message, int] = {}
    sent: defaultdict[Link, list[Message]] = defaultdict(list)
    for steps in schedule.steps_R:
        for index, step in enumerate(steps):
            used_at.update((message, index) for message in inputs_of(placement, step))
            for message in outputs_of(placement, step):
                if not message.is_local:
                    sent[link_of(message)].append(message)
    finished = _finished_before(schedule)
    posts = {}
    for link, messages in sent.items():
        earliest = len(schedule.steps_R[link[1]])
        backwards = []
        for message in reversed(messages):  # what comes behind on the link may have to be posted earlier
            earliest = min(earliest, used_at[message] - prefetch)
            backwards.append((max(earliest, finished[message]), message))
        posts[link] = backwards[::-1]
    return posts


def _finished_before(schedule: Schedule) -> dict[Message, int]:
    """For each message how many of its target's steps must be finished before it can be made: before their sends
    are out, a receive of it could only be in their way.
    """
    placement = schedule.placement
    # known[r]: how many steps each rank must have finished for rank r to be where it is
    known = [[0] * placement.num_ranks for _ in range(placement.num_ranks)]
    known_at: dict[Message, list[int]] = {}
    for rank, index in dependency_order(schedule):
        step = schedule.steps_R[rank][index]
        for message in inputs_of(placement, step):
            known[rank] = [max(both) for both in zip(known[rank], known_at[message], strict=True)]
        known[rank][rank] = index + 1
        known_at.update((message, list(known[rank])) for message in outputs_of(placement, step))
    return {message: known_by_source[message.target] for message, known_by_source in known_at.items()}
