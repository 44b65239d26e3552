"""Layers of the real model on every rank: pairs and the same chunks in sequence take turns, and every rank tells how
long they took, what of the transfers was hidden by what, and which thread started which hop when."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.overlap.block import ORDERS, Accelerator, Work, batch_of, make_block_stage
from benchmarks.overlap.race import Report, Sample, in_pairs, in_sequence, samples
from benchmarks.overlap.times import W
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.parallel.expert.group import Lane as Groups
from deepseek_train.parallel.mesh import make_mesh
from deepseek_train.parallel.traffic import LinkBytes, Purpose, Traffic
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.values import Boundary, LossScales
from deepseek_train.schedule.action import Kind, Schedule
from deepseek_train.schedule.overlap import FIGURE_4, Lane, Order
from deepseek_train.schedule.rows import pairs
from deepseek_train.schedule.timeline import PhaseSpan, Span, Timeline
from deepseek_train.spec.layout import ParallelLayout

_SECOND = {Purpose.DISPATCH: Among.NODE, Purpose.COMBINE: Among.NODES}  # where rows go in their second hop


@dataclass(frozen=True)
class Leg:
    """One hop of rows, as it started. ``at``: of ``time.perf_counter``."""

    at: float
    second: bool
    by_network: bool  # not by the thread that computes


@dataclass(frozen=True)
class BlockSample:
    """One forward and one backward chunk on one rank. Seconds; of hops, how many."""

    pair: Sample
    transfers: float  # something was under way
    announce: float  # of it, what the routers decided
    announce_exposed: float
    announced: tuple[
        tuple[float, float], ...
    ]  # (start, end) of each, of ``time.perf_counter``: all ranks' clock
    hidden_by_shared: float
    hidden_by_weights: float
    second_hops: int
    by_network: int  # of the second hops
    while_computing: int  # of the second hops


@dataclass(frozen=True)
class Told:
    """What a rank found, by order: for each round its samples. ``worked``, ``late``: the CPU time of its computations,
    and the time by which they came late, as shares of the time computed."""

    samples: dict[str, list[list[BlockSample]]]
    worked: float
    late: float


def bytes_across(rank: int, world: int, work: Work) -> int:
    """Bytes that this rank sends to other nodes in one forward and one backward."""
    run, group, _ = _prepare(rank, world, work, in_sequence(1))
    run({})
    sent = group.traffic.take()
    return (sent.plan.cross + sent.dispatch.cross + sent.combine.cross) // 2


def race_block(rank: int, world: int, work: Work) -> Told:
    """Collective; a first round does not count."""
    prepared = {
        name: _prepare(rank, world, work, in_pairs(work.pairs) if order else in_sequence(work.pairs), order)
        for name, order in ORDERS.items()
    }
    found: dict[str, list[list[BlockSample]]] = {order: [] for order in prepared}
    worked = late = computed = 0.0
    for turn in range(work.rounds + 1):
        losses = []
        for order, (run, _, legs) in prepared.items():
            legs.clear()
            done = run(work.times)
            losses.append(done.losses)
            if turn:
                found[order].append(_block_samples(done.report, legs))
                worked, late = worked + done.worked, late + done.late
                computed += sum(p.end - p.start for p in done.report.phases if p.lane is Lane.COMPUTE)
        if any(these != losses[0] for these in losses):
            raise RuntimeError(f"rank {rank}: losses of {', '.join(ORDERS)} are {losses}: must be equal")
    return Told(found, worked / computed, late / computed)


def one_block_pair(rank: int, world: int, work: Work) -> tuple[list[Span], list[PhaseSpan]]:
    """The last of three pairs, as it was traced on this rank."""
    run, _, _ = _prepare(rank, world, work, in_pairs(3))
    report = run(work.times).report
    both = pairs(report.spans)[3]
    begin, end = both[0].start, both[0].end
    inside = [p for p in report.phases if begin <= p.start < end]
    return [replace(s, rank=rank) for s in both], [replace(p, rank=rank) for p in inside]


@dataclass(frozen=True)
class _Done:
    """One pass. ``losses``: by micro-batch."""

    report: Report
    losses: list[float]
    worked: float
    late: float


Run = Callable[[Mapping[tuple[str, Kind], float]], _Done]


def _prepare(
    rank: int, world: int, work: Work, schedule: Schedule, order: Order | None = FIGURE_4
) -> tuple[Run, ExpertGroup, list[Leg]]:
    """A pass over ``schedule``, which starts on all ranks at once; what it will send; the hops it will start."""
    mesh = make_mesh(
        ParallelLayout(1, world, world),
        schedule.placement,
        rank,
        embeds=(),
        ranks_per_node=work.ranks_per_node,
        two_hop=True,
    )
    legs: list[Leg] = []
    group, queue = _noting(mesh.expert_group, legs), WeightGradQueue()
    stages = {0: make_block_stage(work, group, queue)}
    boundary = Boundary((1, work.tokens, work.hidden), torch.float32, torch.device("cpu"))
    executor = Executor(stages, mesh.links, queue, boundary, order or FIGURE_4)
    return partial(_one_pass, executor, PreparedSchedule(schedule, 0), work, rank), mesh.expert_group, legs


class _Noted(Traffic):
    """Counts for ``total``, and writes down when rows leave ``among`` ranks."""

    def __init__(self, total: Traffic, among: Among, legs: list[Leg]) -> None:
        super().__init__()
        self._total, self._among, self._legs = total, among, legs

    def add(self, purpose: Purpose, sent: LinkBytes) -> None:
        self._total.add(purpose, sent)
        if purpose in _SECOND:
            by_network = threading.get_ident() != threading.main_thread().ident
            self._legs.append(Leg(time.perf_counter(), self._among is _SECOND[purpose], by_network))


def _noting(group: ExpertGroup, legs: list[Leg]) -> ExpertGroup:
    def noted(lane: Groups) -> Groups:
        return {
            among: replace(peers, traffic=_Noted(group.traffic, among, legs)) for among, peers in lane.items()
        }

    return replace(group, forward=noted(group.forward), backward=noted(group.backward))


def _one_pass(
    executor: Executor,
    prepared: PreparedSchedule,
    work: Work,
    rank: int,
    times: Mapping[tuple[str, Kind], float],
) -> _Done:
    dist.barrier()
    origin, device = time.perf_counter(), Accelerator(times)
    scales = LossScales(main=1.0, mtp=0.0, balance=1e-4)
    ran = executor.run(prepared, partial(batch_of, work, rank), scales, device)
    losses = [loss.item() for _, loss in sorted(ran.main.items())]
    return _Done(Report(origin, device.spans, device.phases), losses, device.worked, device.late)


def _block_samples(report: Report, legs: list[Leg]) -> list[BlockSample]:
    inner = report.spans[1:-1]
    return [
        block_sample(report, legs, pair, forward.start, backward.end)
        for pair, forward, backward in zip(samples(report), inner[::2], inner[1::2], strict=True)
    ]


def block_sample(report: Report, legs: list[Leg], pair: Sample, begin: float, end: float) -> BlockSample:
    """Between ``begin`` and ``end`` (as the report's phases)."""
    computed = [p for p in report.phases if p.lane is Lane.COMPUTE]
    moved = [p for p in report.phases if p.lane is Lane.COMMUNICATION]
    announced = [p for p in moved if p.name == "announce"]
    shared = [p for p in computed if p.name == "shared" and p.kind is not W]
    weights = [p for p in computed if p.kind is W]

    def alone(transfers: list[PhaseSpan], hidden_by: Iterable[PhaseSpan]) -> float:
        """Seconds of ``transfers`` beside which nothing of ``hidden_by`` ran."""
        return Timeline(1, (), (*transfers, *hidden_by)).exposed_communication(0, begin, end)

    under_way = alone(moved, ())
    starts = {leg.at - report.origin: leg for leg in legs if leg.second}
    second = {at: leg for at, leg in starts.items() if begin <= at < end}
    return BlockSample(
        pair=pair,
        transfers=under_way,
        announce=alone(announced, ()),
        announce_exposed=alone(announced, computed),
        announced=tuple(
            (report.origin + p.start, report.origin + p.end) for p in announced if begin <= p.start < end
        ),
        hidden_by_shared=under_way - alone(moved, shared),
        hidden_by_weights=under_way - alone(moved, weights),
        second_hops=len(second),
        by_network=sum(leg.by_network for leg in second.values()),
        while_computing=sum(any(p.start <= at < p.end for p in computed) for at in second),
    )
