"""Made-up but plausible runs for the monitor's tests: same arguments, same numbers."""

import math
from dataclasses import replace

import numpy as np

from deepseek_train.monitor.jsonl import History
from deepseek_train.monitor.metrics import EvalMetrics, StepMetrics
from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.rows import pairs
from deepseek_train.schedule.timeline import PhaseSpan, Span, Timeline

STEP = StepMetrics(
    step=120,
    tokens=1_966_080,
    loss=3.21451,
    mtp_loss=3.42102,
    balance_loss=1.01,
    grad_norm=0.8421,
    lr=2.2e-4,
    batch_size=64,
    step_seconds=1.3,
    tokens_per_second=12_345.0,
    expert_load={1: (10, 20, 30, 20), 2: (20, 20, 20, 20)},
    memory_bytes=1_288_490_188,
    skipped=False,
)


def make_history(
    steps: int = 300,
    layers: tuple[int, ...] = (1, 2, 3),
    experts: int = 16,
    eval_every: int = 50,
    seed: int = 0,
) -> History:
    """Loss falls from ln(4096), experts even out, step 180 is skipped."""
    rng = np.random.default_rng(seed)
    skew_LE = rng.normal(0, 0.9, (len(layers), experts))
    made, evaluations = [], []
    for step in range(1, steps + 1):
        tokens = step * 16_384
        loss = 3.1 + 5.2 * math.exp(-step / 60) + float(rng.normal(0, 0.06))
        popularity_LE = np.exp(skew_LE * math.exp(-step / 70) + rng.normal(0, 0.06, skew_LE.shape))
        counts_LE = (popularity_LE / popularity_LE.sum(1, keepdims=True) * 16_384 * 4).astype(int)
        skipped = step == 180
        made.append(
            replace(
                STEP,
                step=step,
                tokens=tokens,
                loss=math.nan if skipped else loss,
                mtp_loss=None if skipped else loss + 0.35 + float(rng.normal(0, 0.03)),
                grad_norm=math.nan if skipped else 0.4 + 3 * math.exp(-step / 20),
                lr=2.2e-4 * min(1.0, step / 30),
                tokens_per_second=12_000 + float(rng.normal(0, 300)),
                expert_load={
                    layer: tuple(int(n) for n in counts)
                    for layer, counts in zip(layers, counts_LE, strict=True)
                },
                skipped=skipped,
            )
        )
        if step % eval_every == 0:
            evaluations.append(EvalMetrics(step, tokens, loss + 0.08, loss + 0.45, 65_536))
    return History(tuple(made), tuple(evaluations))


def make_timeline(ranks: int = 4, microbatches: int = 12, side_by_side: bool = False) -> Timeline:
    """Two directions of micro-batches over a mirrored pipeline, each rank greedy: a pair if it can, then a
    backward, then a forward, else queued weight gradients. ``side_by_side``: a pair's halves run in turn."""
    last = ranks - 1
    done: dict[tuple[Kind, int, int], float] = {}  # (kind, stage, micro-batch) -> time
    free = [0.0] * ranks
    queued: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    spans: list[Span] = []

    def rank_of(stage: int, microbatch: int) -> int:
        return stage if microbatch < microbatches // 2 else last - stage

    def ready(kind: Kind, rank: int, now: float) -> tuple[int, int] | None:
        for microbatch in range(microbatches):
            for stage in range(ranks):
                if rank_of(stage, microbatch) != rank or (kind, stage, microbatch) in done:
                    continue
                needs = (Kind.FORWARD, stage - 1) if kind is Kind.FORWARD else (Kind.BACKWARD, stage + 1)
                if kind is Kind.BACKWARD and stage == last:
                    needs = (Kind.FORWARD, last)
                at_start = kind is Kind.FORWARD and stage == 0
                if at_start or done.get((*needs, microbatch), math.inf) <= now:
                    return stage, microbatch
        return None

    def run(
        kind: Kind, work: tuple[int, int], rank: int, start: float, end: float, paired: bool = False
    ) -> None:
        key = Kind.FORWARD if kind is Kind.FORWARD else Kind.BACKWARD
        if kind is not Kind.BACKWARD_WEIGHT:
            done[(key, *work)] = end
        spans.append(Span(rank, kind, *work, start, end, paired))
        free[rank] = max(free[rank], end)

    now = 0.0
    while len(done) < 2 * ranks * microbatches or any(queued):
        for rank in range(ranks):
            if free[rank] > now:
                continue
            forward, backward = ready(Kind.FORWARD, rank, now), ready(Kind.BACKWARD, rank, now)
            in_flight = sum(1 for s in spans if s.rank == rank and s.kind is Kind.FORWARD)
            in_flight -= sum(
                1 for s in spans if s.rank == rank and s.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)
            )
            if backward and forward:
                middle = now + 1.0 if side_by_side else now
                run(Kind.FORWARD, forward, rank, now, now + 1.0 if side_by_side else now + 2.7, True)
                run(Kind.BACKWARD, backward, rank, middle, now + 2.7, True)
            elif backward and now < 4 * ranks:
                run(Kind.BACKWARD, backward, rank, now, now + 2.0)
            elif backward:
                run(Kind.BACKWARD_INPUT, backward, rank, now, now + 1.0)
                queued[rank].append(backward)
            elif forward and in_flight <= ranks:
                run(Kind.FORWARD, forward, rank, now, now + 1.0)
            elif queued[rank]:
                run(Kind.BACKWARD_WEIGHT, queued[rank].pop(0), rank, now, now + 1.0)
        now = round(now + 0.1, 6)
    unit = 0.0123  # seconds
    return Timeline(ranks, tuple(replace(s, start=s.start * unit, end=s.end * unit) for s in spans))


# of a pair of one layer: what is run, on which lane, from and to, in tenths of the pair
_PAIR = (
    ("experts", Kind.BACKWARD_INPUT, Lane.COMPUTE, 0, 2),
    ("combine", Kind.FORWARD, Lane.COMMUNICATION, 0, 1.5),
    ("dispatch", Kind.BACKWARD_INPUT, Lane.COMMUNICATION, 1.2, 3.5),  # both are under way
    ("experts", Kind.BACKWARD_WEIGHT, Lane.COMPUTE, 2, 3),
    ("attend", Kind.FORWARD, Lane.COMPUTE, 4, 6),  # 3 to 3.5 is exposed
    ("dispatch", Kind.FORWARD, Lane.COMMUNICATION, 6, 7.5),
    ("attend", Kind.BACKWARD_INPUT, Lane.COMPUTE, 6, 8),
    ("experts", Kind.FORWARD, Lane.COMPUTE, 8, 10),
)
EXPOSED_SHARE = 0.05


def with_phases(timeline: Timeline) -> Timeline:
    """``timeline`` with the phases of ``_PAIR`` in each of its pairs; ``EXPOSED_SHARE`` of a pair's communication is
    hidden by nothing."""
    phases = []
    for rank in range(timeline.num_ranks):
        for group in pairs([span for span in timeline.spans if span.rank == rank]):
            if len(group) < 2:
                continue
            begin, tenth = group[0].start, (group[1].end - group[0].start) / 10
            for name, kind, lane, start, end in _PAIR:
                of = group[kind is not Kind.FORWARD]
                times = begin + start * tenth, begin + end * tenth
                phases.append(PhaseSpan(rank, lane, name, kind, of.stage, of.microbatch, *times))
    return replace(timeline, phases=tuple(phases))
