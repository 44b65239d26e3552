"""What the ranks of ``block_race`` found, in figures and in words."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.overlap.block import ORDERS, Work
from benchmarks.overlap.block_race import BlockSample, Told
from benchmarks.overlap.paper import predict_block
from benchmarks.overlap.times import TRACE_EXPOSED, TRACE_RATIO


@dataclass(frozen=True)
class BlockResult:
    """One order at one rate of the links. Medians over rounds, pairs and ranks; of exposed communication also the least
    and the most. Shares are of the time of F + B unless said otherwise."""

    order: str
    ratio: float  # communication / compute, set by the rate
    rate_mbit: float
    ratio_in_sequence: float  # measured: seconds in which transfers are under way / compute that was set
    wall_ms: float
    wall_least_ms: float
    wall_most_ms: float
    compute_ms: float
    transfers_ms: float  # something is under way
    exposed_ms: float  # and nothing is computed
    exposed: float
    exposed_least: float
    exposed_most: float
    not_computing: float  # whatever the reason
    on_paper_ms: float
    not_computing_on_paper: float
    announce_ms: float
    announce_exposed_ms: float
    one_announce_ms: float
    one_announce_from_last_start_ms: float  # what it takes once the last rank has started it
    hidden_by_shared_ms: float
    hidden_by_weights_ms: float
    second_hops: int
    by_network: float  # share of the second hops
    while_computing: float
    worked: float  # CPU time of computations, share of the time computed; the most of all ranks
    late: float
    samples: int


def block_results(told: Sequence[Told], work: Work, ratio: float, rate_mbit: float) -> list[BlockResult]:
    """Of both orders. ``told``: by rank."""
    found = {
        order: [s for one in told for turn in one.samples[order] for s in turn] for order in told[0].samples
    }
    alone = statistics.median(s.transfers for s in found["in sequence"]) / work.compute
    return [_result(order, samples, told, work, ratio, rate_mbit, alone) for order, samples in found.items()]


def _result(
    order: str,
    samples: list[BlockSample],
    told: Sequence[Told],
    work: Work,
    ratio: float,
    rate_mbit: float,
    alone: float,
) -> BlockResult:
    def middle(seconds: Callable[[BlockSample], float]) -> float:
        return 1e3 * statistics.median(map(seconds, samples))

    announced = [
        at_once
        for turns in zip(*(one.samples[order] for one in told), strict=True)
        for ranks in zip(*turns, strict=True)
        for at_once in zip(*(sample.announced for sample in ranks), strict=True)
    ]
    exposed = [s.pair.exposed_transfers / s.pair.wall for s in samples]
    second = sum(s.second_hops for s in samples)
    paper = predict_block(work.layers, work.times, work.transfers(ratio), ORDERS[order])
    return BlockResult(
        order=order,
        ratio=ratio,
        rate_mbit=rate_mbit,
        ratio_in_sequence=alone,
        wall_ms=middle(lambda s: s.pair.wall),
        wall_least_ms=1e3 * min(s.pair.wall for s in samples),
        wall_most_ms=1e3 * max(s.pair.wall for s in samples),
        compute_ms=middle(lambda s: s.pair.compute),
        transfers_ms=middle(lambda s: s.transfers),
        exposed_ms=middle(lambda s: s.pair.exposed_transfers),
        exposed=statistics.median(exposed),
        exposed_least=min(exposed),
        exposed_most=max(exposed),
        not_computing=statistics.median(s.pair.exposed for s in samples),
        on_paper_ms=1e3 * paper.wall,
        not_computing_on_paper=paper.exposed,
        announce_ms=middle(lambda s: s.announce),
        announce_exposed_ms=middle(lambda s: s.announce_exposed),
        one_announce_ms=1e3 * statistics.median(end - start for one in announced for start, end in one),
        one_announce_from_last_start_ms=1e3
        * statistics.median(end - max(start for start, _ in one) for one in announced for _, end in one),
        hidden_by_shared_ms=middle(lambda s: s.hidden_by_shared),
        hidden_by_weights_ms=middle(lambda s: s.hidden_by_weights),
        second_hops=second,
        by_network=sum(s.by_network for s in samples) / second,
        while_computing=sum(s.while_computing for s in samples) / second,
        worked=max(one.worked for one in told),
        late=max(one.late for one in told),
        samples=len(samples),
    )


def _table(head: str, results: Sequence[BlockResult], row: Callable[[BlockResult], str]) -> str:
    lines = [
        f"| communication / compute | order | {head} |",
        "| ---: | --- |" + " ---: |" * (head.count("|") + 1),
    ]
    return "\n".join([*lines, *(f"| {r.ratio:.2f} | {r.order} | {row(r)} |" for r in results)])


def times_table(results: Sequence[BlockResult]) -> str:
    return _table(
        "measured so | F + B, ms | least | most | on paper | compute, ms | transfers under way, ms | exposed, ms "
        "| exposed | least | most | not computing | on paper",
        results,
        lambda r: (
            f"{r.ratio_in_sequence:.2f} | {r.wall_ms:.0f} | {r.wall_least_ms:.0f} | {r.wall_most_ms:.0f} "
            f"| {r.on_paper_ms:.0f} | {r.compute_ms:.0f} | {r.transfers_ms:.0f} | {r.exposed_ms:.1f} "
            f"| {r.exposed:.1%} | {r.exposed_least:.1%} | {r.exposed_most:.1%} | {r.not_computing:.1%} "
            f"| {r.not_computing_on_paper:.1%}"
        ),
    )


def insides_table(results: Sequence[BlockResult]) -> str:
    return _table(
        "announcements, ms | of it exposed | one of them | once all have started | hidden by shared expert, ms "
        "| by weight gradients, ms | second hops | started by the network | while computing",
        results,
        lambda r: (
            f"{r.announce_ms:.1f} | {r.announce_exposed_ms:.1f} | {r.one_announce_ms:.1f} "
            f"| {r.one_announce_from_last_start_ms:.1f} | {r.hidden_by_shared_ms:.1f} "
            f"| {r.hidden_by_weights_ms:.1f} | {r.second_hops} | {r.by_network:.1%} | {r.while_computing:.1%}"
        ),
    )


def block_report(facts: Mapping[str, object], results: Sequence[BlockResult], work: Work) -> str:
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return f"""# The MoE block's communication, over links of set speed

Made by `python -m benchmarks.comm_overlap --only block` (needs root, for network namespaces): `MoeBlock` layers of the
real model (router, announced plan, two hops there and back, experts, shared expert) on {work.nodes} nodes of
{work.ranks_per_node} ranks, run by the real executor as overlapped pairs and as the same chunks in sequence, in turns.
Losses of all are compared, and are equal to the last bit. Every node is a network namespace; every rank has a link of
its own between nodes, which a token bucket holds to the rate. *Paired*: the paper's figure 4, in which what routers
have decided travels beside nothing; *routers first*: under the attention's weight gradients. Tokens travel in FP8,
results in BF16, gradients the other way round.

**What is not real: the length of computations.** CPU cores shared by {work.ranks} ranks are no {work.ranks}
accelerators. So every computation, forward, input gradients, weight gradients, and the shared expert's beside the
dispatch, does its real work on a narrow model and then sleeps until its set time is over: DeepSeek's profile,
{work.stretch:g} times as long, of the experts' time one ninth for the shared expert. That leaves the cores to the
network's threads, as an accelerator does. Plans, and laying rows down at the end, take what they take.

{listed}

*Exposed*: a transfer is under way and nothing is computed. *Not computing*: whatever the reason. Medians, least and
most of all samples (a forward and a backward on one rank). DeepSeek's published trace shows {TRACE_EXPOSED:.1%} at
{TRACE_RATIO}. The ratio is set by the rate of the links and the bytes on them; *measured so* is the time transfers take
in sequence over the compute that was set. On paper: one computation and one transfer at a time, nothing else takes
time.

{times_table(results)}

## Inside

*Once all have started*: what is left of an announcement after the last rank's start; before, it waits for that rank.
*Hidden by*: the time in which a transfer was under
way beside that computation. A *second hop* (inside the node on the way to experts, between nodes on the way home) is
started by whoever ends the first: *by the network*, a thread of gloo did; *while computing*, this rank's own thread was
in a computation at that moment.

{insides_table(results)}

## One pair

![pair](comm_overlap_block.png)
"""
