"""List scheduling: the pipeline is played in time, and a rank that is free takes the step it likes best.

Backwards are always split (I, then W when there is time) unless they run in a pair, and pairs are only considered
where they save time.
"""

from dataclasses import dataclass
from heapq import heappop, heappush

from deepseek_train.schedule.search.compiled import BACKWARD, FORWARD, INPUT, PAIR, WEIGHT, Compiled, Rows
from deepseek_train.schedule.search.memory import Limits


@dataclass(frozen=True)
class Policy:
    """How much a free rank likes a candidate. Good weights are found by trying (``starts``), not by theory: they
    have to reach many different sensible schedules.
    """

    forward: float = 0.0
    forward_deep: float = 0.0  # x stage, over their number
    forward_left: float = 1.0  # x share of the micro-batches of its stage and direction still to do
    forward_live: float = -1.0  # x micro-batches its stage keeps, over what 1F1B would keep there
    forward_crowd: float = 0.0  # x micro-batches the rank keeps, over its limit
    backward: float = 1.0
    backward_deep: float = 0.0
    backward_left: float = 1.0
    backward_crowd: float = 0.0
    pair: float = 1.0  # on top of both halves
    weight: float = -3.0
    weight_queued: float = 0.0  # x weight gradients queued, over the limit
    wait: float = -2.0  # x time until its message arrives, over that of a mean forward and backward


@dataclass
class _Lane:
    """One stage and direction of a rank, whose micro-batches run in order."""

    stage: int
    chunks: list[int]
    forwards: int = 0  # done so far
    backwards: int = 0


Candidate = tuple[float, float, int]  # liking without waiting, start, chunk


def play(work: Compiled, limits: Limits, policy: Policy) -> Rows:
    """The rows ``policy`` makes within ``limits``, which have room for one micro-batch of every stage and direction
    of a rank.
    """
    ranks = [_Rank(work, limits, policy, rank) for rank in range(work.placement.num_ranks)]
    arrived = dict.fromkeys(range(work.placement.num_microbatches), 0.0)
    target = {m: r for r, rank in enumerate(ranks) for c in rank.lane_of for m in (c, work.num_chunks + c)}
    free = [0.0] * len(ranks)
    events = [(0.0, rank) for rank in range(len(ranks))]
    while events:
        now, rank = heappop(events)
        if now < free[rank]:
            continue
        code, start = ranks[rank].choose(now, arrived)
        if start > now:
            heappush(events, (start, rank))
        elif code >= 0:
            ranks[rank].take(code)
            _, outputs, length = work.ops[code]
            free[rank] = now + length
            heappush(events, (free[rank], rank))
            for message, latency in outputs:
                arrived[message] = free[rank] + latency
                heappush(events, (arrived[message], target[message]))
    return [rank.row for rank in ranks]


class _Rank:
    """What one rank has done so far."""

    def __init__(self, work: Compiled, limits: Limits, policy: Policy, rank: int) -> None:
        placement = work.placement
        self.work, self.limits, self.policy = work, limits, policy
        self.lanes: list[_Lane] = []
        count = placement.num_microbatches
        for stage, holders in enumerate(placement.ranks_SX):
            for direction in (d for d, holder in enumerate(holders) if holder == rank):
                ours = [m for m in range(count) if placement.direction_of(m) == direction]
                self.lanes.append(_Lane(stage, [stage * count + m for m in ours]))
        self.lane_of = {chunk: lane for lane in self.lanes for chunk in lane.chunks}
        self.queue: list[int] = []
        self.row: list[int] = []
        seconds = [
            work.ops[kind * work.num_chunks + c][2] for kind in (FORWARD, BACKWARD) for c in self.lane_of
        ]
        self.patience = policy.wait * len(self.lane_of) / (sum(seconds) or 1.0)

    def choose(self, now: float, arrived: dict[int, float]) -> tuple[int, float]:
        """The step liked best and when it can start; -1: nothing is known to come."""
        size = self.work.num_chunks
        forwards, backwards = self._candidates(now, arrived)
        options = list(forwards)
        options += [(liking, start, INPUT * size + chunk) for liking, start, chunk in backwards]
        for f_liking, f_start, f in forwards:
            for b_liking, b_start, b in backwards:
                alone = self.work.ops[f][2] + self.work.ops[BACKWARD * size + b][2]
                if self.work.ops[self.work.pair(f, b)][2] < 0.9999 * alone:
                    liking = f_liking + b_liking + self.policy.pair
                    options.append((liking, max(f_start, b_start), self.work.pair(f, b)))
        if self.queue:
            liking = self.policy.weight + self.policy.weight_queued * len(self.queue) / self.limits.held
            options.append((liking, now, WEIGHT * size + self.queue[0]))
        if not options:
            return -1, now
        _, start, code = max((like + self.patience * (at - now), at, code) for like, at, code in options)
        return code, start

    def take(self, code: int) -> None:
        """Account for the step."""
        kind, chunk = divmod(code, self.work.num_chunks)
        if kind == FORWARD or kind >= PAIR:
            self.lane_of[kind - PAIR if kind >= PAIR else chunk].forwards += 1
        if kind == INPUT or kind >= PAIR:
            self.lane_of[chunk].backwards += 1
        if kind == INPUT:
            self.queue.append(chunk)
        if kind == WEIGHT:
            self.queue.pop(0)
        self.row.append(code)

    def _candidates(self, now: float, arrived: dict[int, float]) -> tuple[list[Candidate], list[Candidate]]:
        """Forwards and backwards whose messages are there or under way. The last places are kept for lanes that
        hold nothing: else one direction could fill rank 0 and the other rank P-1, each waiting for the other.
        """
        policy, num_stages = self.policy, self.work.placement.num_stages
        forwards, backwards = [], []
        live = sum(lane.forwards - lane.backwards for lane in self.lanes)
        empty = sum(lane.forwards == lane.backwards < len(lane.chunks) for lane in self.lanes)
        room = min(self.limits.activations, self.limits.held - len(self.queue)) - live
        crowd = live / self.limits.activations
        for lane in self.lanes:
            count, kept = len(lane.chunks), lane.forwards - lane.backwards
            if lane.forwards < count and room > empty - (not kept):
                chunk = lane.chunks[lane.forwards]
                if chunk in arrived:
                    liking = policy.forward + policy.forward_deep * lane.stage / num_stages
                    liking += policy.forward_left * (1 - lane.forwards / count) + policy.forward_crowd * crowd
                    liking += policy.forward_live * kept / (num_stages - lane.stage)
                    forwards.append((liking, max(now, arrived[chunk]), chunk))
            if kept:
                chunk = lane.chunks[lane.backwards]
                if self.work.num_chunks + chunk in arrived:
                    liking = policy.backward + policy.backward_deep * lane.stage / num_stages
                    liking += (
                        policy.backward_left * (1 - lane.backwards / count) + policy.backward_crowd * crowd
                    )
                    backwards.append((liking, max(now, arrived[self.work.num_chunks + chunk]), chunk))
        return forwards, backwards
