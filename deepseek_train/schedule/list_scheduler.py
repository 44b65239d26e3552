"""List scheduling: play the pipeline in time; a rank that is free starts what a policy likes best.

A policy is a few weights. What they are good for is found by search (``auto``), so a policy needs no theory: it
needs to reach many different sensible schedules.
"""

from dataclasses import dataclass
from heapq import heappop, heappush

from deepseek_train.schedule.compiled import BACKWARD, INPUT, PAIR, WEIGHT, Compiled, Limits, Rows


@dataclass(frozen=True)
class Policy:
    """How much a free rank likes each candidate; it takes the best. Depth and share left run from 0 to 1."""

    forward: float = 0.0
    forward_deep: float = 0.0  # times the depth of the stage
    forward_left: float = 1.0  # times the share of its micro-batches that are still to do
    forward_live: float = -1.0  # times what the stage keeps, over what 1F1B would keep
    forward_crowd: float = 0.0  # times what the rank keeps, over its limit
    backward: float = 1.0
    backward_crowd: float = 0.0  # times what the rank keeps, over its limit
    backward_deep: float = 0.0
    backward_left: float = 1.0
    pair: float = 1.0  # on top of both halves
    weight: float = -3.0
    weight_queued: float = 0.0  # times the length of the queue, over the number of ranks
    idle: float = -10.0  # what is liked less waits until something else comes
    wait: float = -2.0  # times how long the candidate is still under way, over a forward and backward


class _Lane:
    """One stage and direction of a rank: its micro-batches come in order."""

    def __init__(self, stage: int, chunks: list[int]) -> None:
        self.stage = stage
        self.chunks = chunks
        self.forwards = self.backwards = 0  # done so far

    @property
    def live(self) -> int:
        return self.forwards - self.backwards


def lanes_of(placement, rank: int) -> list[_Lane]:
    lanes = []
    for stage, ranks in enumerate(placement.ranks_SX):
        for direction, holder in enumerate(ranks):
            if holder == rank:
                microbatches = [m for m in range(placement.num_microbatches) if placement.direction_of(m) == direction]
                lanes.append(_Lane(stage, [stage * placement.num_microbatches + m for m in microbatches]))
    return lanes


class Player:
    """One play of ``policy``."""

    def __init__(self, work: Compiled, limits: Limits, policy: Policy) -> None:
        placement = work.placement
        self.work, self.limits, self.policy = work, limits, policy
        self.num_stages = placement.num_stages
        self.lanes_R = [lanes_of(placement, rank) for rank in range(placement.num_ranks)]
        self.queue_R: list[list[int]] = [[] for _ in self.lanes_R]
        self.arrived: dict[int, float] = {c: 0.0 for c in range(placement.num_microbatches)}
        self.target = {m: rank for rank, lanes in enumerate(self.lanes_R) for lane in lanes for c in lane.chunks for m in (c, work.num_chunks + c)}
        alone = [work.op(k * work.num_chunks + s * placement.num_microbatches)[2] for k in (0, 1) for s in range(self.num_stages)]
        self.unit = 2 * sum(alone) / len(alone) or 1.0
        self.rows: Rows = [[] for _ in self.lanes_R]

    def play(self) -> Rows:
        """Steps of all ranks, in order."""
        free = [0.0] * len(self.rows)
        events = [(0.0, rank) for rank in range(len(self.rows))]
        forced = False
        left = sum(len(l.chunks) for ls in self.lanes_R for l in ls)
        while True:
            if not events:
                if all(l.backwards == len(l.chunks) for ls in self.lanes_R for l in ls) and not any(self.queue_R): break
                forced = True
                now = max(free)
                events = [(now, rank) for rank in range(len(self.rows))]
            now, rank = heappop(events)
            if now < free[rank]:
                continue
            while events and events[0] == (now, rank):
                heappop(events)
            code, start = self.choose(rank, now, forced)
            if code < 0:
                continue
            if start > now:
                heappush(events, (start, rank))
                continue
            self.take(rank, code)
            forced = False
            _, outputs, length = self.work.op(code)
            free[rank] = now + length
            heappush(events, (free[rank], rank))
            for message, latency in outputs:
                arrival = self.arrived[message] = free[rank] + latency
                heappush(events, (arrival, self.target[message]))
        return self.rows

    def choose(self, rank: int, now: float, forced: bool=False) -> tuple[int, float]:
        """The step the rank likes best and when it can start; -1: nothing is known to come."""
        policy, arrived, n = self.policy, self.arrived, self.work.num_chunks
        lanes, queue = self.lanes_R[rank], self.queue_R[rank]
        best, best_score, best_start = -1, -1e30 if forced else policy.idle, now
        forwards, backwards = [], []
        crowd = 0.0
        live = sum(lane.live for lane in lanes)
        empty = sum(1 for lane in lanes if not lane.live and lane.backwards < len(lane.chunks))
        room = min(self.limits.activations, self.limits.total - len(queue)) - live
        crowd = live / self.limits.activations
        for lane in lanes:
            count = len(lane.chunks)
            if lane.forwards < count and room > empty - (not lane.live):
                chunk = lane.chunks[lane.forwards]
                if chunk in arrived:
                    start = max(now, arrived[chunk])
                    score = (
                        policy.forward
                        + policy.forward_crowd * crowd
                        + policy.forward_deep * lane.stage / self.num_stages
                        + policy.forward_left * (count - lane.forwards) / count
                        + policy.forward_live * lane.live / (self.num_stages - lane.stage)
                    )
                    forwards.append((score, start, chunk))
            if lane.live:
                chunk = lane.chunks[lane.backwards]
                if n + chunk in arrived:
                    start = max(now, arrived[n + chunk])
                    score = (
                        policy.backward
                        + policy.backward_crowd * crowd
                        + policy.backward_deep * lane.stage / self.num_stages
                        + policy.backward_left * (count - lane.backwards) / count
                    )
                    backwards.append((score, start, chunk))
        slow = policy.wait / self.unit
        for score, start, chunk in forwards:
            score += slow * (start - now)
            if score > best_score:
                best, best_score, best_start = chunk, score, start
        for score, start, chunk in backwards:
            score += slow * (start - now)
            if score > best_score:
                best, best_score, best_start = INPUT * n + chunk, score, start
            for f_score, f_start, f_chunk in forwards:
                code = (PAIR + f_chunk) * n + chunk
                if self.work.op(code)[2] < 0.9999 * (self.work.op(f_chunk)[2] + self.work.op(BACKWARD * n + chunk)[2]):
                    both = max(start, f_start)
                    both_score = score + f_score + policy.pair + slow * (both - start)
                    if both_score > best_score:
                        best, best_score, best_start = code, both_score, both
        if queue:
            score = policy.weight + policy.weight_queued * len(queue) / len(self.rows)
            if score > best_score or best < 0:
                best, best_start = WEIGHT * n + queue[0], now
        return best, best_start

    def take(self, rank: int, code: int) -> None:
        kind, chunk = divmod(code, self.work.num_chunks)
        if kind == WEIGHT:
            self.queue_R[rank].pop(0)
        else:
            forward = kind - PAIR if kind >= PAIR else chunk if kind == 0 else -1
            for lane in self.lanes_R[rank]:
                if lane.stage == forward // self.work.placement.num_microbatches and forward >= 0 and lane.chunks[lane.forwards % len(lane.chunks)] == forward:
                    lane.forwards += 1
            if kind:
                for lane in self.lanes_R[rank]:
                    if lane.backwards < len(lane.chunks) and lane.chunks[lane.backwards] == chunk:
                        lane.backwards += 1
        if kind == INPUT:
            self.queue_R[rank].append(chunk)
        self.rows[rank].append(code)
