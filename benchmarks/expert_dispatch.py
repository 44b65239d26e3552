"""Flat and two-hop dispatch raced over links that really are uneven: fast inside nodes, slow between them.

Nodes are network namespaces on this machine, with links shaped by tc; ranks are gloo processes. Every round goes to all
dispatchers in turn, with the same tokens and routing, and every result is checked. Needs root, `ip` and `tc`; without
them bytes are counted, and no time is told.

    python -m benchmarks.expert_dispatch --rounds 7
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cluster.meter import Sample, wall, wire
from benchmarks.cluster.nodes import Cluster, NodeBytes, available
from benchmarks.cluster.ranks import run_on_cluster
from benchmarks.dispatch.case import CASES, EXPERTS, TOP_K, Case
from benchmarks.dispatch.local import V3, crossing_if_nodes_came_second, local_times
from benchmarks.dispatch.picture import draw
from benchmarks.dispatch.race import Run, race
from deepseek_train.monitor.machine import machine_facts
from tests.harness import run_ranks

RESULTS = Path(__file__).parent / "results"
PATIENCE = 560  # seconds for one case


@dataclass(frozen=True)
class Result:
    """One dispatcher in one case. Times: medians over rounds, milliseconds; None without a cluster. Bytes: of a node
    and round, means."""

    case: str
    dispatcher: str
    wall_ms: float | None  # dispatch and combine, from the first rank's start to the last one's end
    wall_least_ms: float | None
    wall_most_ms: float | None
    announce_ms: float | None
    plan_ms: float  # of a rank, Python included
    wire_mb: float | None  # what the node's link has sent, headers and barriers included
    counted_mb: float  # what the dispatcher says it sent to other nodes
    over_least: float  # counted / the least possible
    faster_than_flat: float | None
    fewer_bytes_than_flat: float  # counted
    fewer_on_the_wire: float | None
    dropped: int  # packets, on all links, in all rounds of all dispatchers


def uncounted(body: object) -> Sample:
    """In the place of ``timed`` where there is no cluster."""
    assert callable(body)
    body()
    return Sample(0.0, 0.0, NodeBytes(0, 0))


def measure(case: Case, rounds: int, *, on_cluster: bool) -> list[Result]:
    """Every dispatcher's result in ``case``."""
    dropped = 0
    if on_cluster:
        with Cluster(case.nodes, rate_mbit=case.rate_mbit) as cluster:
            ranks = run_on_cluster(race, case.ranks, cluster, case, rounds, timeout=PATIENCE)
            dropped = cluster.dropped()
    else:
        ranks = run_ranks(race, case.ranks, case, rounds, uncounted, timeout=PATIENCE)
    rows = {name: [[rank[name][i] for rank in ranks] for i in range(rounds)] for name in ranks[0]}
    summed = {name: _result(case, name, of, dropped, on_cluster) for name, of in rows.items()}
    flat = summed["flat"]
    return [_compared(one, flat) for one in summed.values()]


def _result(case: Case, name: str, rounds: list[list[Run]], dropped: int, on_cluster: bool) -> Result:
    walls = [1e3 * wall([run.sample for run in ranks]) for ranks in rounds] if on_cluster else []
    announces = [1e3 * wall([run.announce for run in ranks]) for ranks in rounds] if on_cluster else []
    plans = [1e3 * run.plan_seconds for ranks in rounds for run in ranks]
    sent = (
        [node.tx for ranks in rounds for node in wire([run.sample for run in ranks], case.nodes)]
        if on_cluster
        else []
    )
    counted = sum(r.sent.dispatch.cross + r.sent.combine.cross for ranks in rounds for r in ranks)
    least = sum(run.sent.least_cross for ranks in rounds for run in ranks)
    return Result(
        case=str(case),
        dispatcher=name,
        wall_ms=statistics.median(walls) if walls else None,
        wall_least_ms=min(walls, default=None),
        wall_most_ms=max(walls, default=None),
        announce_ms=statistics.median(announces) if announces else None,
        plan_ms=statistics.median(plans),
        wire_mb=statistics.fmean(sent) / 1e6 if sent else None,
        counted_mb=counted / case.nodes / len(rounds) / 1e6,
        over_least=counted / least,
        faster_than_flat=None,
        fewer_bytes_than_flat=1.0,
        fewer_on_the_wire=None,
        dropped=dropped,
    )


def _compared(one: Result, flat: Result) -> Result:
    faster = flat.wall_ms / one.wall_ms if flat.wall_ms and one.wall_ms else None
    on_the_wire = flat.wire_mb / one.wire_mb if flat.wire_mb and one.wire_mb else None
    facts = asdict(one) | {
        "faster_than_flat": faster,
        "fewer_bytes_than_flat": flat.counted_mb / one.counted_mb,
        "fewer_on_the_wire": on_the_wire,
    }
    return Result(**facts)


def table(results: Sequence[Result]) -> str:
    lines = [
        "| case | dispatcher | wall, ms | least to most | announce, ms | plan, ms | link, MB | counted, MB | x least "
        "| faster than flat | fewer bytes | fewer on the link |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        span = "-" if r.wall_least_ms is None else f"{r.wall_least_ms:.0f} to {r.wall_most_ms:.0f}"
        lines.append(
            f"| {r.case} | {r.dispatcher} | {_number(r.wall_ms, '.0f')} | {span} | {_number(r.announce_ms, '.0f')} "
            f"| {r.plan_ms:.1f} | {_number(r.wire_mb, '.2f')} | {r.counted_mb:.2f} | {r.over_least:.3f} "
            f"| {_number(r.faster_than_flat, '.2f')} | {r.fewer_bytes_than_flat:.2f} "
            f"| {_number(r.fewer_on_the_wire, '.2f')} |"
        )
    return "\n".join(lines)


def _number(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"


def report(
    facts: dict[str, object], results: Sequence[Result], reason: str | None, local: dict[str, float]
) -> str:
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    around = "\n".join(
        ["| | ms |", "| --- | ---: |", *(f"| {name} | {ms:.1f} |" for name, ms in local.items())]
    )
    how = "![walls](expert_dispatch.png)" if reason is None else f"Without a cluster ({reason}): bytes alone."
    return f"""# Dispatch and combine over uneven links

Made by `python -m benchmarks.expert_dispatch`. Nodes are network namespaces on one machine, their links shaped by tc;
ranks of a node talk through its loopback. {EXPERTS} experts, top {TOP_K}, BF16 rows unless FP8 is said, random routing
with a node limit. *Flat* sends a token once to every rank that needs it, *two_hop* once to every node. *Wall* is one
dispatch and one combine, from the first rank's start to the last one's end; *announce* and *plan* come before it, once
for a layer's forward and backward; *link* is what a node's interface has sent meanwhile, *counted* what dispatchers say
they sent between nodes, *least* one row for every (token, other node with an expert of it), there and back.

{listed}

{table(results)}

{how}

## Around the hops

One process, milliseconds: a rank of V3's EP64 with {V3.tokens} tokens of {V3.channels} channels, a quarter of its
micro-batch. Ways that were tried and not taken stand beside those that were.

{around}

Hops the other way round, first inside a node to the place of the expert's rank, then across, would cross
{crossing_if_nodes_came_second(V3, 8):.2f} times as often as must be.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="of every dispatcher in every case")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="their numbers")
    parser.add_argument("--count-only", action="store_true", help="no cluster, no times")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for expert_dispatch.*")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    reason = "as asked" if args.count_only else available()
    if reason is not None:
        print(f"no cluster can be made here, bytes are counted and nothing is timed: {reason}", flush=True)
    machine, load_before = machine_facts(), os.getloadavg()[0]
    results: list[Result] = []
    for number in args.cases:
        results += measure(CASES[number], args.rounds, on_cluster=reason is None)
        print(table(results[-4:]), flush=True)
    facts = {
        "cpu": f"{machine.cpu}, {machine.cores} cores",
        **dict(machine.versions),
        "revision": machine.git_revision or "unknown",
        "load, before and after": f"{load_before:.1f}, {os.getloadavg()[0]:.1f}",
        "rounds": args.rounds,
        "cases": ", ".join(f"{c}: {c.tokens} tokens of {c.channels}, {c.rate_mbit:g} Mbit/s" for c in CASES),
    }
    local = local_times(args.rounds)
    numbers = {**facts, "results": [asdict(r) for r in results], "local_ms": local}
    (args.output / "expert_dispatch.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (args.output / "expert_dispatch.md").write_text(report(facts, results, reason, local))
    if reason is None:
        draw(results, args.output / "expert_dispatch.png")


if __name__ == "__main__":
    main()
