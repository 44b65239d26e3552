"""What one rank computes around the hops, and what the ways not taken would cost: medians of one process.

Legend: N tokens, D channels, S sent rows.
"""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.dispatch.case import EXPERTS, TOP_K, Case, hidden, routed
from deepseek_train.parallel.expert.announce import Told, message
from deepseek_train.parallel.expert.flat import plan_flat
from deepseek_train.parallel.expert.group import ExpertGroup
from deepseek_train.parallel.expert.journey import UNCHANGED, Journey, summed
from deepseek_train.parallel.expert.two_hop import plan_two_hop
from deepseek_train.parallel.expert.wire import WireFormat, encode, quantise

V3 = Case(8, 8, 4, 1024, 7168, 0)  # a quarter of its 4096 tokens


def local_times(repeats: int) -> dict[str, float]:
    """Milliseconds by name."""
    routings = [routed(V3, rank, seed=0) for rank in range(V3.ranks)]
    messages = torch.stack([message(r, EXPERTS, 0, V3.tokens) for r in routings])
    told, group = Told.of(messages, TOP_K), ExpertGroup(0, V3.ranks, V3.node_size)
    plan = plan_two_hop(told, V3.tokens, EXPERTS, group, UNCHANGED)
    assert isinstance(plan.there, Journey)
    first, second = plan.there.hops
    x_ND, weights_NK = hidden(V3, 0, 0), routings[0].weights_NK
    rows = {format: encode((x_ND, weights_NK), format) for format in WireFormat}
    words = rows[WireFormat.SAME]
    came_back = x_ND.index_select(0, first.taken_S)
    tried: dict[str, Callable[[], object]] = {
        "announce: the message": lambda: message(routings[0], EXPERTS, 0, V3.tokens),
        "plan, flat": lambda: plan_flat(told, V3.tokens, EXPERTS, group, UNCHANGED),
        "plan, two_hop": lambda: plan_two_hop(told, V3.tokens, EXPERTS, group, UNCHANGED),
        "encode BF16": lambda: encode((x_ND, weights_NK), WireFormat.SAME),
        "encode FP8": lambda: encode((x_ND, weights_NK), WireFormat.FP8),
        "copy rows of 8-byte words (taken)": lambda: words.index_select(0, first.taken_S),
        "copy rows of bytes": lambda: words.view(torch.uint8).index_select(0, first.taken_S),
        "copy rows of BF16, without weights": lambda: x_ND.index_select(0, first.taken_S),
        "quantise, then copy (taken)": lambda: encode((x_ND, weights_NK), WireFormat.FP8).index_select(
            0, first.taken_S
        ),
        "copy, then quantise": lambda: quantise(x_ND.index_select(0, first.taken_S)),
        "sum rows that came home": lambda: summed(came_back, first.sums),
        "copy rows to hand on, second hop": lambda: _held(words, len(second.taken_S)),
    }
    return {name: 1e3 * _median(run, repeats) for name, run in tried.items()}


def _held(words: torch.Tensor, count: int) -> torch.Tensor:
    return words.index_select(0, torch.arange(count) % len(words))


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def crossing_if_nodes_came_second(case: Case, ranks: int) -> float:
    """Rows that would cross between nodes, over the least, if a token went first inside its own node, to the place of
    its expert's rank, and then across: one for every (token, rank elsewhere). Counted for ``ranks`` ranks."""
    rows = pairs = 0
    for rank in range(ranks):
        ids_NK, node = routed(case, rank, seed=0).expert_ids_NK, rank // case.node_size
        targets = torch.nn.functional.one_hot(ids_NK // (EXPERTS // case.ranks), case.ranks).amax(1)
        of_nodes = targets.unflatten(1, (case.nodes, -1))
        away = torch.arange(case.nodes) != node
        rows += int(of_nodes[:, away].sum())
        pairs += int(of_nodes[:, away].amax(-1).sum())
    return rows / pairs
