"""A placement and its durations as tables of plain numbers, for searches that judge thousands of schedules.

A step is a number here. With N = S x M chunks (stage s, micro-batch m is chunk s M + m) the code of F, B, I, W of
chunk c is c, N + c, 2 N + c, 3 N + c, and the pair of forward f and backward b is (4 + f) N + b. A message is a
number too: c is the activation that chunk c needs, N + c its gradient.
"""

from collections.abc import Callable

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule, Step
from deepseek_train.schedule.dataflow import Message, MessageKind, inputs_of, outputs_of
from deepseek_train.schedule.simulate import Durations, seconds

KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
FORWARD, BACKWARD, INPUT, WEIGHT, PAIR = range(5)  # code // N; of a pair it is PAIR or more

Rows = list[list[int]]  # for each rank its steps' codes, in order
Ends = list[list[float]]  # for each rank its steps' ends, in seconds
Op = tuple[tuple[int, ...], tuple[tuple[int, float], ...], float]  # inputs, (output, latency) each, seconds


def last_end(rows: Rows, ends_R: Ends) -> float:
    """The makespan of ``rows`` with these ``ends``; infinite where a row waits for ever."""
    if any(len(ends) < len(row) for ends, row in zip(ends_R, rows, strict=True)):
        return float("inf")
    return max(ends[-1] for ends in ends_R if ends)


class Ops(dict[int, Op]):
    """Inputs, outputs and seconds of steps by their codes; worked out when first asked for."""

    def __init__(self, make: Callable[[int], Op]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, code: int) -> Op:
        self[code] = op = self._make(code)
        return op


class Compiled:
    """Steps of ``placement`` as numbers, with their messages and seconds in ``ops``."""

    def __init__(self, placement: Placement, durations: Durations) -> None:
        self.placement = placement
        self.num_chunks = placement.num_stages * placement.num_microbatches
        self.ops = Ops(self._op)
        self._durations = durations

    def pair(self, forward: int, backward: int) -> int:
        """The code of the pair of two chunks."""
        return (PAIR + forward) * self.num_chunks + backward

    def ends(self, rows: Rows) -> Ends:
        """When each step ends, as ``simulate`` has it. A row that waits for ever ends early."""
        ends_R: Ends = [[] for _ in rows]
        ops = self.ops
        arrived = [-1.0] * (2 * self.num_chunks)
        waiting: dict[int, int] = {}
        runnable = list(range(len(rows)))
        while runnable:
            rank = runnable.pop()
            ends = ends_R[rank]
            time = ends[-1] if ends else 0.0
            for code in rows[rank][len(ends) :]:
                inputs, outputs, length = ops[code]
                missing = -1
                for message in inputs:
                    if arrived[message] < 0.0:
                        missing = message
                    elif arrived[message] > time:
                        time = arrived[message]
                if missing >= 0:
                    waiting[missing] = rank
                    break
                time += length
                ends.append(time)
                for message, latency in outputs:
                    arrived[message] = time + latency
                    if message in waiting:
                        runnable.append(waiting.pop(message))
        return ends_R

    def makespan(self, rows: Rows) -> float:
        """What ``simulate`` says of these rows; infinite where they wait for ever."""
        return last_end(rows, self.ends(rows))

    def bound(self) -> float:
        """No schedule of this placement is faster: a rank cannot start before a micro-batch gets there, and has
        to do all its work, in as many pairs as can be (all but its first forward) that save the most.
        """
        placement, count = self.placement, self.placement.num_microbatches
        forward_S, backward_S = (
            [self.ops[kind * self.num_chunks + stage * count][2] for stage in range(placement.num_stages)]
            for kind in (FORWARD, BACKWARD)
        )
        bounds = []
        for rank in range(placement.num_ranks):
            stages = placement.stages_of(rank)
            pairs = ((f, b, self.ops[self.pair(f * count, b * count)][2]) for f in stages for b in stages)
            saved = max(max(0.0, forward_S[f] + backward_S[b] - both) for f, b, both in pairs)
            share_S = {
                s: count // placement.num_directions * placement.ranks_SX[s].count(rank) for s in stages
            }
            work = sum((forward_S[s] + backward_S[s]) * share for s, share in share_S.items())
            bounds.append(sum(forward_S[: stages[0]]) + work - saved * (sum(share_S.values()) - 1))
        return max(bounds)

    def rows(self, schedule: Schedule) -> Rows:
        """The codes of a schedule of this placement."""
        return [[self._code(step) for step in steps] for steps in schedule.steps_R]

    def schedule(self, name: str, rows: Rows) -> Schedule:
        """The schedule of codes."""
        return Schedule(name, self.placement, tuple(tuple(map(self.step, row)) for row in rows))

    def step(self, code: int) -> Step:
        """The step of a code."""
        kind, chunk = divmod(code, self.num_chunks)
        if kind >= PAIR:
            return Pair(self._action(FORWARD, kind - PAIR), self._action(BACKWARD, chunk))
        return self._action(kind, chunk)

    def _op(self, code: int) -> Op:
        step = self.step(code)
        latency = self._durations.latency
        return (
            tuple(self._number(m) for m in inputs_of(self.placement, step)),
            tuple(
                (self._number(m), 0.0 if m.is_local else latency) for m in outputs_of(self.placement, step)
            ),
            seconds(step, self._durations),
        )

    def _action(self, kind: int, chunk: int) -> Action:
        stage, microbatch = divmod(chunk, self.placement.num_microbatches)
        return Action(stage, KINDS[kind], microbatch)

    def _code(self, step: Step) -> int:
        if isinstance(step, Pair):
            return self.pair(self._code(step.forward), self._code(step.backward) - self.num_chunks)
        chunk = step.stage * self.placement.num_microbatches + step.microbatch
        return KINDS.index(step.kind) * self.num_chunks + chunk

    def _number(self, message: Message) -> int:
        chunk = message.stage * self.placement.num_microbatches + message.microbatch
        return chunk if message.kind is MessageKind.ACTIVATION else self.num_chunks + chunk
