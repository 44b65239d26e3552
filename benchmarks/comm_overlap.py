"""How much of the experts' communication an overlapped pair hides, beside the same chunks in sequence.

MoE layers whose computations sleep for the times of DeepSeek's published profile (stretched), and whose dispatch and
combine are real all-to-alls over gloo that last at least as long as their bytes would on a link of set speed. The real
executor runs both orders in turns. Also: when messages between stages leave from inside a pair, and one pair's two
lanes as a picture and a Perfetto trace.

Then the layers of the real model, two hops and all, over network namespaces with shaped links; that needs root.

    python -m benchmarks.comm_overlap --rounds 6
    python -m benchmarks.comm_overlap --only block
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.overlap.block_measure import add_block_arguments, measure_block
from benchmarks.overlap.paper import predict
from benchmarks.overlap.picture import draw_sweep
from benchmarks.overlap.race import EarlySend, Sample, early_sends, one_pair, race
from benchmarks.overlap.times import TRACE_EXPOSED, TRACE_RATIO, layer_times
from deepseek_train.monitor.machine import machine_facts
from deepseek_train.monitor.pictures.lanes import draw_lanes
from deepseek_train.schedule.overlap import FIGURE_4, PROFILE, Lane
from deepseek_train.schedule.perfetto import write_trace
from deepseek_train.schedule.timeline import Timeline
from tests.harness import run_ranks

RESULTS = Path(__file__).parent / "results"
PATIENCE = 900  # seconds for one race


@dataclass(frozen=True)
class Result:
    """One order at one ratio; medians over rounds, pairs and ranks. ``exposed``: the share of the time in which
    nothing is computed, whatever the reason; ``transfers``: of it, while a transfer was under way."""

    order: str
    ratio: float  # communication / compute
    pair_ms: float
    compute_ms: float
    exposed: float
    transfers: float
    exposed_least: float
    exposed_most: float
    exposed_on_paper: float
    samples: int


def measure(ratio: float, args: argparse.Namespace) -> list[Result]:
    times = layer_times(args.stretch, ratio)
    ranks = run_ranks(race, args.ranks, times, args.layers, args.pairs, args.rounds, timeout=PATIENCE)
    paper = {
        "paired": predict(args.layers, times, FIGURE_4),
        "in sequence": predict(args.layers, times, None),
    }
    return [
        _result(order, ratio, [s for rank in ranks for one in rank[order] for s in one], on_paper.exposed)
        for order, on_paper in paper.items()
    ]


def _result(order: str, ratio: float, samples: list[Sample], on_paper: float) -> Result:
    exposed = [s.exposed for s in samples]
    return Result(
        order=order,
        ratio=ratio,
        pair_ms=1e3 * statistics.median(s.wall for s in samples),
        compute_ms=1e3 * statistics.median(s.compute for s in samples),
        exposed=statistics.median(exposed),
        transfers=statistics.median(s.exposed_transfers / s.wall for s in samples),
        exposed_least=min(exposed),
        exposed_most=max(exposed),
        exposed_on_paper=on_paper,
        samples=len(samples),
    )


def sends(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By kind of message: how long before its pair's end it began to leave, medians."""
    times = layer_times(args.stretch, TRACE_RATIO)
    ranks = run_ranks(early_sends, 4, times, args.layers, 2, timeout=PATIENCE)
    by_kind: dict[str, list[EarlySend]] = {}
    for send in (s for rank in ranks for s in rank):
        by_kind.setdefault(send.kind.value, []).append(send)
    return {
        kind: {
            "ms_before_the_end": 1e3 * statistics.median(s.ahead for s in found),
            "least_ms_before_the_end": 1e3 * min(s.ahead for s in found),
            "pair_ms": 1e3 * statistics.median(s.pair for s in found),
            "messages": len(found),
        }
        for kind, found in sorted(by_kind.items())
    }


def draw_pair(args: argparse.Namespace) -> None:
    """One traced pair on every rank."""
    times = layer_times(args.stretch, TRACE_RATIO)
    ranks = run_ranks(one_pair, args.ranks, times, args.layers, timeout=PATIENCE)
    timeline = Timeline(
        args.ranks,
        tuple(span for spans, _ in ranks for span in spans),
        tuple(phase for _, phases in ranks for phase in phases),
    )
    write_trace(timeline, args.output / "comm_overlap_pair.perfetto.json", "one overlapped pair")
    draw_lanes(timeline, args.output / "comm_overlap_pair.png", "An overlapped pair", rank=0)


def table(results: Sequence[Result]) -> str:
    lines = [
        "| communication / compute | order | F + B, ms | compute, ms | exposed | transfers | least | most | on paper |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.ratio:.2f} | {r.order} | {r.pair_ms:.0f} | {r.compute_ms:.0f} | {r.exposed:.1%} | {r.transfers:.1%} "
        f"| {r.exposed_least:.1%} | {r.exposed_most:.1%} | {r.exposed_on_paper:.1%} |"
        for r in results
    ]
    return "\n".join(lines)


def orders_on_paper(args: argparse.Namespace) -> str:
    """What each order of ``schedule.overlap`` would expose."""
    lines = [
        f"| exposed on paper | {' | '.join(f'{ratio:.2f}' for ratio in args.ratios)} |",
        "| --- |" + " ---: |" * len(args.ratios),
    ]
    for name, order in {"FIGURE_4": FIGURE_4, "PROFILE": PROFILE, "in sequence": None}.items():
        found = [predict(args.layers, layer_times(1.0, ratio), order).exposed for ratio in args.ratios]
        lines.append(f"| {name} | {' | '.join(f'{exposed:.1%}' for exposed in found)} |")
    bounds = [max(0.0, 1 - 1 / ratio) for ratio in args.ratios]
    lines.append(f"| no order can hide | {' | '.join(f'{bound:.1%}' for bound in bounds)} |")
    return "\n".join(lines)


def report(
    found: dict[str, object], results: Sequence[Result], early: dict[str, dict[str, float]], on_paper: str
) -> str:
    facts = "\n".join(f"- {key}: {value}" for key, value in found.items())
    messages = "\n".join(
        f"- {kind}s leave {f['ms_before_the_end']:.1f} ms (least {f['least_ms_before_the_end']:.1f}) before the end of "
        f"their pair of {f['pair_ms']:.0f} ms ({f['messages']:.0f} messages)"
        for kind, f in early.items()
    )
    return f"""# Communication that an overlapped pair hides

Made by `python -m benchmarks.comm_overlap`: the executor on sleeping computations and real all-to-alls of set speed,
pairs and the same chunks in sequence in turns. *Exposed* is the share of the time in which nothing was computed,
whatever the reason: median, least and most of all samples; *transfers* is the part of it in which a transfer was under
way. DeepSeek's published trace shows {TRACE_EXPOSED:.1%} of that, at {TRACE_RATIO} of communication. The rest is what
it costs a CPU to start transfers and phases.

{facts}

{table(results)}

![sweep](comm_overlap.png)

## On paper

One thing is computed at a time, one transfer is under way at a time, and a transfer starts once all that was issued
before it is computed. So it is where one thread computes and starts transfers, and where NCCL waits for what is in the
current stream; PROFILE is for a device whose transfers wait for their own inputs only.

{on_paper}

## Messages between stages

DualPipe on two stages, experts on two ranks each:

{messages}

## One pair

Also as `comm_overlap_pair.perfetto.json`, for ui.perfetto.dev.

![pair](comm_overlap_pair.png)

The layers of the real model, in two hops over nodes with shaped links: [comm_overlap_block.md](comm_overlap_block.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("layers", "block"), help="sleeping layers, or the real block")
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=2)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.8, TRACE_RATIO, 1.0, 1.2])
    parser.add_argument("--layers", type=int, default=4, help="in each chunk; the trace has 4")
    parser.add_argument("--stretch", type=float, default=4.0, help="how much slower than the trace")
    parser.add_argument("--pairs", type=int, default=3, help="in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for comm_overlap.*")
    add_block_arguments(parser)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.only != "block":
        measure_layers(args)
    if args.only != "layers":
        measure_block(args)


def measure_layers(args: argparse.Namespace) -> None:
    """Writes comm_overlap.* and prints its table."""
    machine = machine_facts()
    load_before = os.getloadavg()[0]
    results = [result for ratio in args.ratios for result in measure(ratio, args)]
    early = sends(args)
    draw_pair(args)
    found = {
        "cpu": f"{machine.cpu}, {machine.cores} cores",
        **dict(machine.versions),
        "revision": machine.git_revision or "unknown",
        "load, before and after": f"{load_before:.1f}, {os.getloadavg()[0]:.1f}",
        "ranks": args.ranks,
        "layers forward and backward": args.layers,
        "compute of a pair, set": f"{1e3 * args.layers * layer_times(args.stretch, 1.0).total(Lane.COMPUTE):.0f} ms",
        "rounds x pairs x ranks": f"{args.rounds} x {args.pairs} x {args.ranks}",
    }
    numbers = {**found, "results": [asdict(r) for r in results], "sends": early}
    (args.output / "comm_overlap.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (args.output / "comm_overlap.md").write_text(report(found, results, early, orders_on_paper(args)))
    draw_sweep(results, args.output / "comm_overlap.png", "Communication that is not hidden")
    print(table(results))


if __name__ == "__main__":
    main()
