"""A placement and its durations as tables of plain numbers, for searches that judge thousands of schedules.

A step is a number here. With N = S x M chunks (stage s, micro-batch m is chunk s * M + m) it is c, N + c,
2 N + c, 3 N + c for F, B, I, W of chunk c, and 4 N + f * N + b for the pair of forward f and backward b.
A message is a number too: c the activation chunk c needs, N + c the gradient it needs.
"""

from dataclasses import dataclass

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule, Step
from deepseek_train.schedule.dataflow import Message, MessageKind, actions_of, inputs_of, outputs_of
from deepseek_train.schedule.simulate import Durations, seconds

KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
FORWARD, BACKWARD, INPUT, WEIGHT, PAIR = range(5)  # code // N, a pair's is 4 or more

Rows = list[list[int]]  # for each rank its steps' codes, in order
Op = tuple[tuple[int, ...], tuple[tuple[int, float], ...], float]  # inputs, (output, latency), seconds


@dataclass(frozen=True)
class Limits:
    """What each rank may hold: micro-batches between F and B or I; those and queued weight gradients."""

    activations: int
    total: int


class Compiled:
    """Steps of ``placement`` as numbers, with their messages and seconds."""

    def __init__(self, placement: Placement, durations: Durations) -> None:
        self.placement = placement
        self.durations = durations
        self.num_chunks = placement.num_stages * placement.num_microbatches
        self._ops: dict[int, Op] = {}

    def op(self, code: int) -> Op:
        """Inputs, outputs with their latency, and seconds of a step; made when first asked for."""
        if code not in self._ops:
            step = self.step(code)
            inputs = tuple(self._number(m) for m in inputs_of(self.placement, step))
            outputs = tuple(
                (self._number(m), 0.0 if m.is_local else self.durations.latency)
                for m in outputs_of(self.placement, step)
            )
            self._ops[code] = inputs, outputs, seconds(step, self.durations)
        return self._ops[code]

    def makespan(self, rows: Rows) -> float:
        """What ``simulate`` says of these rows; infinite where they block one another."""
        free, done = [0.0] * len(rows), [0] * len(rows)
        arrived = [-1.0] * (2 * self.num_chunks)
        waiting: dict[int, int] = {}
        runnable = list(range(len(rows)))
        while runnable:
            rank = runnable.pop()
            row, time = rows[rank], free[rank]
            for index in range(done[rank], len(row)):
                inputs, outputs, length = self._ops.get(row[index]) or self.op(row[index])
                start = time
                for message in inputs:
                    arrival = arrived[message]
                    if arrival < 0.0:
                        waiting[message] = rank
                        break
                    if arrival > start:
                        start = arrival
                else:
                    time = start + length
                    done[rank] = index + 1
                    for message, latency in outputs:
                        arrived[message] = time + latency
                        if message in waiting:
                            runnable.append(waiting.pop(message))
                    continue
                break
            free[rank] = time
        return float("inf") if waiting else max(free)

    def fits(self, row: list[int], limits: Limits) -> bool:
        """Whether one rank's steps stay inside ``limits``."""
        live = queued = 0
        for code in row:
            kind = code // self.num_chunks
            if kind == FORWARD or kind >= PAIR:
                live += 1
                if live > limits.activations or live + queued > limits.total:
                    return False
            if kind == BACKWARD or kind >= PAIR:
                live -= 1
            elif kind == INPUT:
                live, queued = live - 1, queued + 1
            elif kind == WEIGHT:
                queued -= 1
        return True

    def code(self, step: Step) -> int:
        """The number of a step."""
        codes = [KINDS.index(a.kind) * self.num_chunks + self._chunk(a.stage, a.microbatch) for a in actions_of(step)]
        return codes[0] if len(codes) == 1 else self.pair(codes[0], codes[1])

    def pair(self, forward: int, backward: int) -> int:
        """The number of two steps, an F and a B, run as a pair."""
        return (PAIR + forward) * self.num_chunks + backward % self.num_chunks

    def step(self, code: int) -> Step:
        """The step of a number."""
        kind, chunk = divmod(code, self.num_chunks)
        if kind >= PAIR:
            return Pair(self._action(FORWARD, kind - PAIR), self._action(BACKWARD, chunk))
        return self._action(kind, chunk)

    def rows(self, schedule: Schedule) -> Rows:
        return [[self.code(step) for step in steps] for steps in schedule.steps_R]

    def schedule(self, name: str, rows: Rows) -> Schedule:
        return Schedule(name, self.placement, tuple(tuple(map(self.step, row)) for row in rows))

    def _action(self, kind: int, chunk: int) -> Action:
        stage, microbatch = divmod(chunk, self.placement.num_microbatches)
        return Action(stage, KINDS[kind], microbatch)

    def _chunk(self, stage: int, microbatch: int) -> int:
        return stage * self.placement.num_microbatches + microbatch

    def _number(self, message: Message) -> int:
        chunk = self._chunk(message.stage, message.microbatch)
        return chunk if message.kind is MessageKind.ACTIVATION else self.num_chunks + chunk
