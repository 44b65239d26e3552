"""A placement and its durations as tables of plain numbers, for searches that judge thousands of schedules.

A step is a number here. With N = S x M chunks (stage s, micro-batch m is chunk s M + m) the code of F, B, I, W of
chunk c is c, N + c, 2 N + c, 3 N + c, and the pair of forward f and backward b is (4 + f) N + b. A message is a
number too: c is the activation that chunk c needs, N + c its gradient.
"""

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule, Step
from deepseek_train.schedule.dataflow import Message, MessageKind, inputs_of, outputs_of
from deepseek_train.schedule.simulate import Durations, seconds

KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
FORWARD, BACKWARD, INPUT, WEIGHT, PAIR = range(5)  # code // N; of a pair it is PAIR or more

Rows = list[list[int]]  # for each rank its steps' codes, in order
Op = tuple[tuple[int, ...], tuple[tuple[int, float], ...], float]  # inputs, (output, latency) each, seconds


class Compiled:
    """Steps of ``placement`` as numbers, with their messages and seconds."""

    def __init__(self, placement: Placement, durations: Durations) -> None:
        self.placement = placement
        self.num_chunks = placement.num_stages * placement.num_microbatches
        self._durations = durations
        self._ops: dict[int, Op] = {}

    def op(self, code: int) -> Op:
        """Inputs, outputs and seconds of a step; worked out when first asked for."""
        found = self._ops.get(code)
        if found is None:
            step = self.step(code)
            latency = self._durations.latency
            found = self._ops[code] = (
                tuple(self._number(m) for m in inputs_of(self.placement, step)),
                tuple((self._number(m), 0.0 if m.is_local else latency) for m in outputs_of(self.placement, step)),
                seconds(step, self._durations),
            )
        return found

    def pair(self, forward: int, backward: int) -> int:
        """The code of the pair of two chunks."""
        return (PAIR + forward) * self.num_chunks + backward

    def ends(self, rows: Rows) -> list[list[float]]:
        """When each step ends, as ``simulate`` has it. A row that waits for ever ends early."""
        ends_R: list[list[float]] = [[] for _ in rows]
        arrived = [-1.0] * (2 * self.num_chunks)
        waiting: dict[int, int] = {}
        runnable = list(range(len(rows)))
        while runnable:
            rank = runnable.pop()
            ends = ends_R[rank]
            time = ends[-1] if ends else 0.0
            for code in rows[rank][len(ends) :]:
                inputs, outputs, length = self.op(code)
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
        ends_R = self.ends(rows)
        if any(len(ends) < len(row) for ends, row in zip(ends_R, rows, strict=True)):
            return float("inf")
        return max(ends[-1] for ends in ends_R if ends)

    def bound(self) -> float:
        """No schedule of this placement is faster: a rank cannot start before the first micro-batch is there, and has to
        do all its work, every forward paired as well as it can be."""
        placement, count = self.placement, self.placement.num_microbatches
        forward_S, backward_S = (
            [self.op(kind * self.num_chunks + stage * count)[2] for stage in range(placement.num_stages)]
            for kind in (FORWARD, BACKWARD)
        )
        bounds = []
        for rank in range(placement.num_ranks):
            stages = placement.stages_of(rank)
            pairs = ((f, b, self.op(self.pair(f * count, b * count))[2]) for f in stages for b in stages)
            saved = max(max(0.0, forward_S[f] + backward_S[b] - both) for f, b, both in pairs)
            work = sum(
                (forward_S[s] + backward_S[s] - saved) * count * placement.ranks_SX[s].count(rank) for s in stages
            )
            bounds.append(sum(forward_S[: stages[0]]) + work / placement.num_directions)
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
