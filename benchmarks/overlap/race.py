"""Pairs and the same chunks in sequence take turns on the same ranks; every rank tells how long each of them took."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.overlap.network import Wire
from benchmarks.overlap.stage import SleepingStage
from benchmarks.overlap.times import LayerTimes
from deepseek_train.parallel.mesh import ParallelMesh, make_mesh
from deepseek_train.parallel.p2p import Links
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.trace import Trace
from deepseek_train.pipeline.values import Boundary, LossScales
from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.dataflow import MessageKind
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.rows import pairs
from deepseek_train.schedule.text import from_text
from deepseek_train.schedule.timeline import PhaseSpan, Span, Timeline
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.spec.stages import StageSpec

SHAPE_BTD = (
    1,
    128,
    64,
)  # 32 KiB of FP32 in each transfer: what it costs the CPU must not disturb the computations
TOKEN = 3  # what every token is, so that losses are known


@dataclass(frozen=True)
class Report:
    """What one rank did in one pass, in seconds since ``origin`` (of ``time.perf_counter``)."""

    origin: float
    spans: list[Span]
    phases: list[PhaseSpan]


@dataclass(frozen=True)
class Sample:
    """One forward and one backward chunk on one rank. Seconds."""

    wall: float
    compute: float
    exposed_transfers: float  # a transfer was under way, nothing was computed

    @property
    def exposed(self) -> float:
        """The share of the time in which nothing was computed, whatever the reason."""
        return 1 - self.compute / self.wall


@dataclass(frozen=True)
class EarlySend:
    """A message that left from inside a pair, ``ahead`` seconds before the pair's end."""

    kind: MessageKind
    ahead: float
    pair: float  # how long the pair took


def in_pairs(num_pairs: int) -> Schedule:
    """One rank and stage; between the first forward and the last backward nothing but pairs."""
    steps = " ".join(["0F0", *(f"0F{m + 1}&0B{m}" for m in range(num_pairs)), f"0B{num_pairs}"])
    return from_text(f"pairs microbatches={num_pairs + 1} stages=0\nrank 0: {steps}")


def in_sequence(num_pairs: int) -> Schedule:
    """The same chunks one after the other."""
    steps = " ".join(["0F0", *(f"0F{m + 1} 0B{m}" for m in range(num_pairs)), f"0B{num_pairs}"])
    return from_text(f"sequence microbatches={num_pairs + 1} stages=0\nrank 0: {steps}")


def race(
    rank: int, world: int, times: LayerTimes, layers: int, num_pairs: int, rounds: int
) -> dict[str, list[list[Sample]]]:
    """``paired`` and ``in sequence``: for each round its samples on this rank; collective."""
    run_paired, run_in_sequence = (
        _prepare(rank, world, schedule, times, layers)
        for schedule in (in_pairs(num_pairs), in_sequence(num_pairs))
    )
    found: dict[str, list[list[Sample]]] = {"paired": [], "in sequence": []}
    for _ in range(rounds):
        found["paired"].append(samples(run_paired()))
        found["in sequence"].append(samples(run_in_sequence()))
    return found


def one_pair(rank: int, world: int, times: LayerTimes, layers: int) -> tuple[list[Span], list[PhaseSpan]]:
    """The second of three pairs, as it was traced on this rank."""
    report = _prepare(rank, world, in_pairs(3), times, layers)()
    both = pairs(report.spans)[2]
    begin, end = both[0].start, both[0].end
    inside = [p for p in report.phases if begin <= p.start < end]
    return [replace(s, rank=rank) for s in both], [replace(p, rank=rank) for p in inside]


def early_sends(rank: int, world: int, times: LayerTimes, layers: int, rounds: int) -> list[EarlySend]:
    """DualPipe on two stages, its experts on ``world`` / 2 ranks each: when messages leave from inside of pairs."""
    noted: list[tuple[MessageKind, float]] = []
    run = _prepare(rank, world, make_schedule("dualpipe", 2, 8), times, layers, noted)
    found = []
    for _ in range(rounds):
        noted.clear()
        report = run()
        for both in pairs(report.spans):
            start, end = report.origin + both[0].start, report.origin + both[0].end
            if len(both) == 2:
                found += [EarlySend(kind, end - at, end - start) for kind, at in noted if start <= at <= end]
    return found


class _NotedLinks(Links):
    """Writes down when each message begins to leave."""

    def __init__(self, mesh: ParallelMesh, noted: list[tuple[MessageKind, float]]) -> None:
        self._real, self._noted = mesh.links, noted
        self.receive = mesh.links.receive  # type: ignore[method-assign]
        self.drain = mesh.links.drain  # type: ignore[method-assign]

    def send(self, tensor: Tensor, target: int, kind: MessageKind, window: int) -> None:
        self._noted.append((kind, time.perf_counter()))
        self._real.send(tensor, target, kind, window)


def _prepare(
    rank: int,
    world: int,
    schedule: Schedule,
    times: LayerTimes,
    layers: int,
    noted: list[tuple[MessageKind, float]] | None = None,
) -> Callable[[], Report]:
    """A pass over ``schedule``, which starts on all ranks at once and returns what this one did."""
    placement = schedule.placement
    data_parallel = world // placement.num_ranks
    layout = ParallelLayout(placement.num_ranks, data_parallel, data_parallel)
    mesh = make_mesh(layout, placement, rank, embeds=(), check_splits=False)
    queue, wire, last = WeightGradQueue(), Wire(), placement.num_stages - 1
    stages = {
        s: SleepingStage(
            StageSpec(s, tuple(range(layers)), s == 0, s == last, mtp_depth=0, embeds=False),
            SHAPE_BTD, times, mesh.expert_group, queue, wire,
        )
        for s in placement.stages_of(mesh.pp_rank)
    }  # fmt: skip
    links = mesh.links if noted is None else _NotedLinks(mesh, noted)
    executor = Executor(stages, links, queue, Boundary(SHAPE_BTD, torch.float32, torch.device("cpu")))
    return partial(
        _one_pass,
        executor,
        PreparedSchedule(schedule, mesh.pp_rank),
        float(TOKEN * 2 ** (layers * (last + 1))),
    )


def _one_pass(executor: Executor, prepared: PreparedSchedule, loss: float) -> Report:
    batch = MicroBatch(torch.full(SHAPE_BTD[:2], TOKEN))
    dist.barrier()
    origin, trace = time.perf_counter(), Trace(prepared.pp_rank, torch.device("cpu"))
    ran = executor.run(prepared, lambda _: batch, LossScales(main=1.0, mtp=0.0, balance=0.0), trace)
    if any(found.item() != loss for found in ran.main.values()):
        raise RuntimeError(f"losses {ran.main} where {loss} belongs: something was not computed, or lost")
    return Report(origin, trace.spans, trace.phases)


def samples(report: Report) -> list[Sample]:
    """Of each forward with the backward that is beside it or follows it; the first forward and last backward stand
    alone and do not count."""
    inner = report.spans[1:-1]
    line = Timeline(1, tuple(report.spans), tuple(report.phases))
    found = []
    for forward, backward in zip(inner[::2], inner[1::2], strict=True):
        begin, end = forward.start, backward.end
        computing = [p for p in report.phases if p.lane is Lane.COMPUTE and begin <= p.start < end]
        exposed = line.exposed_communication(forward.rank, begin, end)
        found.append(Sample(end - begin, sum(p.end - p.start for p in computing), exposed))
    return found
