"""``python -m benchmarks.comm_overlap --only block``: links of several rates, one after the other, and their files."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from benchmarks.cluster import available, run_on_cluster
from benchmarks.cluster.nodes import FRAME
from benchmarks.overlap.block import Work
from benchmarks.overlap.block_race import bytes_across, one_block_pair, race_block
from benchmarks.overlap.block_report import BlockResult, block_report, block_results, times_table
from benchmarks.overlap.links import OwnLinks, on_own_link
from benchmarks.overlap.times import TRACE_RATIO
from deepseek_train.monitor.machine import machine_facts
from deepseek_train.monitor.pictures.lanes import draw_lanes
from deepseek_train.schedule.timeline import Timeline
from tests.harness import run_ranks

NAME = "comm_overlap_block"
_PATIENCE = 900  # seconds for one rate


def add_block_arguments(parser: argparse.ArgumentParser) -> None:
    block = parser.add_argument_group("the real block (all files: comm_overlap_block.*)")
    block.add_argument("--block-ratios", type=float, nargs="+", default=[0.5, TRACE_RATIO, 1.2])
    block.add_argument("--nodes", type=int, default=2)
    block.add_argument("--ranks-per-node", type=int, default=2)
    block.add_argument("--block-layers", type=int, default=4)
    block.add_argument("--tokens", type=int, default=256, help="of a micro-batch on one rank")
    block.add_argument("--hidden", type=int, default=512)
    block.add_argument("--block-stretch", type=float, default=8.0, help="how much slower than the trace")
    block.add_argument("--block-pairs", type=int, default=3, help="in each round")
    block.add_argument("--block-rounds", type=int, default=6)


def measure_block(args: argparse.Namespace) -> None:
    """Writes all files; where there can be no namespaces, says so and writes none."""
    reason = available()
    if reason is not None:
        print(
            f"The real block needs nodes, and there can be none here: {reason}. Its results stay as they are."
        )
        return
    work = Work(
        nodes=args.nodes,
        ranks_per_node=args.ranks_per_node,
        layers=args.block_layers,
        tokens=args.tokens,
        hidden=args.hidden,
        stretch=args.block_stretch,
        pairs=args.block_pairs,
        rounds=args.block_rounds,
    )
    machine, load_before = machine_facts(), os.getloadavg()[0]
    rank_bytes = bytes_of_a_rank(work)
    results = [result for ratio in args.block_ratios for result in measure_ratio(work, ratio, rank_bytes)]
    draw_block_pair(work, rate_of(work, TRACE_RATIO, rank_bytes), args.output / f"{NAME}.png")
    facts = {
        "cpu": f"{machine.cpu}, {machine.cores} cores",
        **dict(machine.versions),
        "revision": machine.git_revision or "unknown",
        "load, before and after": f"{load_before:.1f}, {os.getloadavg()[0]:.1f}",
        "layers forward and backward": work.layers,
        "compute of F + B, set": f"{1e3 * work.compute:.0f} ms",
        "CPU time in it, at most": f"{max(r.worked for r in results):.1%}",
        "computations later than set, at most": f"{max(r.late for r in results):.1%}",
        "tokens of a micro-batch, width": f"{work.tokens}, {work.hidden}",
        "bytes a rank sends to other nodes in F + B": f"{rank_bytes / 1e6:.2f} MB",
        "rates of a link": ", ".join(f"{rate:.0f}" for rate in dict.fromkeys(r.rate_mbit for r in results))
        + " Mbit/s",
        "rounds x pairs x ranks": f"{work.rounds} x {work.pairs} x {work.ranks}",
    }
    numbers = {**facts, "work": asdict(work), "results": [asdict(r) for r in results]}
    (args.output / f"{NAME}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (args.output / f"{NAME}.md").write_text(block_report(facts, results, work))
    print(times_table(results))


def bytes_of_a_rank(work: Work) -> float:
    """That it sends to other nodes in one forward and backward, mean of the ranks; counted without nodes."""
    sent: list[int] = run_ranks(bytes_across, work.ranks, work, timeout=_PATIENCE)
    return sum(sent) / work.ranks


def rate_of(work: Work, ratio: float, rank_bytes: float) -> float:
    """Mbit/s at which ``rank_bytes`` take ``ratio`` of the time that is computed."""
    return 8e-6 * rank_bytes / (ratio * work.compute)


def burst_of(rate: float) -> float:
    """Milliseconds of the least burst of a link, three frames: what more an idle link sends at once is no rate."""
    return 3 * 8e-3 * FRAME / rate


def measure_ratio(work: Work, ratio: float, rank_bytes: float) -> list[BlockResult]:
    """Raises ClusterUnavailable."""
    rate = rate_of(work, ratio, rank_bytes)
    with OwnLinks(work.nodes, rate_mbit=rate, burst_ms=burst_of(rate), links=work.ranks_per_node) as cluster:
        told = run_on_cluster(on_own_link, work.ranks, cluster, work, race_block, timeout=_PATIENCE)
    return block_results(told, work, ratio, rate)


def draw_block_pair(work: Work, rate: float, path: Path) -> None:
    """One traced pair on every rank. Raises ClusterUnavailable."""
    with OwnLinks(work.nodes, rate_mbit=rate, burst_ms=burst_of(rate), links=work.ranks_per_node) as cluster:
        ranks = run_on_cluster(on_own_link, work.ranks, cluster, work, one_block_pair, timeout=_PATIENCE)
    timeline = Timeline(
        work.ranks,
        tuple(span for spans, _ in ranks for span in spans),
        tuple(phase for _, phases in ranks for phase in phases),
    )
    draw_lanes(timeline, path, "An overlapped pair of real MoE layers", rank=0)
