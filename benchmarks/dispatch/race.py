"""Dispatchers take turns on the same ranks, tokens and routing; every result is checked.

An expert multiplies by its number + 1, so a token comes home as itself times a known sum.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cluster.meter import Sample, timed
from benchmarks.dispatch.case import EXPERTS, Case, hidden, routed
from deepseek_train.parallel.expert.announce import TokenRouting
from deepseek_train.parallel.expert.dispatcher import Planned, flat, two_hop
from deepseek_train.parallel.expert.group import Among, ExpertGroup, make_expert_group
from deepseek_train.parallel.expert.journey import Journey, WireFormats
from deepseek_train.parallel.expert.local import Dispatched
from deepseek_train.parallel.expert.plan import DispatchPlan
from deepseek_train.parallel.expert.wire import WireFormat
from deepseek_train.spec.links import ExpertTraffic

Measure = Callable[[Callable[[], object]], Sample]
FP8 = WireFormats(WireFormat.FP8, WireFormat.BF16)


@dataclass(frozen=True)
class Run:
    """One rank's view of one round of one dispatcher: dispatch and combine; before, the announcement and the plan."""

    sample: Sample
    announce: Sample
    plan_seconds: float
    sent: ExpertTraffic
    start_seconds: float  # dispatch alone, until tokens are there


def race(rank: int, size: int, case: Case, rounds: int, measure: Measure = timed) -> dict[str, list[Run]]:
    """For each dispatcher, its rounds; collective."""
    group = make_expert_group(
        tuple(range(size)),
        rank,
        case.node_size,
        lambda ranks: dist.new_group(list(ranks), use_local_synchronization=True),
        among=tuple(Among),
    )
    runners = {
        "flat": flat(group),
        "two_hop": two_hop(group),
        "two_hop, FP8": two_hop(group, FP8),
    }
    found: dict[str, list[Run]] = {name: [] for name in [*runners, "two_hop, two chunks"]}
    for seed in range(-1, rounds):  # the first one warms up
        routing, x_ND = routed(case, rank, seed + 1), hidden(case, rank, seed + 1)
        for name, dispatcher in runners.items():
            found[name].append(_run(dispatcher, routing, x_ND, measure))
        found["two_hop, two chunks"].append(_in_chunks(runners["two_hop"], routing, x_ND, measure))
    return {name: runs[1:] for name, runs in found.items()}


def _planned(
    dispatcher: Planned, routing: TokenRouting, measure: Measure
) -> tuple[DispatchPlan, Sample, float]:
    told, route = dispatcher.announce(routing, EXPERTS, layer=0)
    messages: list[Tensor] = []
    sample = measure(lambda: messages.extend(route.start((told,)).wait()))
    start = time.perf_counter()
    plan = dispatcher.plan(messages[0], routing, EXPERTS)
    return plan, sample, time.perf_counter() - start


def _run(dispatcher: Planned, routing: TokenRouting, x_ND: Tensor, measure: Measure) -> Run:
    group = dispatcher.group
    plan, announce, plan_seconds = _planned(dispatcher, routing, measure)
    y_ND, arrived_at = [], []
    group.traffic.take()

    def there_and_back() -> None:
        x_RD, weights_RK = plan.there.start((x_ND, routing.weights_NK)).wait()
        arrived_at.append(time.perf_counter())
        y_ND.extend(plan.home.start((_experts(Dispatched(x_RD, weights_RK, plan.arrivals), group),)).wait())

    sample = measure(there_and_back)
    sent = group.traffic.take()
    _check(y_ND[0], x_ND, routing, 2**-3 if dispatcher.formats == FP8 else 2**-6)
    return Run(sample, announce, plan_seconds, sent, arrived_at[0] - sample.start)


def _in_chunks(dispatcher: Planned, routing: TokenRouting, x_ND: Tensor, measure: Measure) -> Run:
    """Two halves of the tokens in process groups of their own: the second hop of one beside the first of the other."""
    group, half = dispatcher.group, len(x_ND) // 2
    parts = [slice(0, half), slice(half, None)]
    routings = [TokenRouting(routing.expert_ids_NK[p], routing.weights_NK[p]) for p in parts]
    planned = [_planned(dispatcher, one, measure) for one in routings]
    y_ND: list[Tensor] = []
    group.traffic.take()

    def there_and_back() -> None:
        going = []
        for (plan, _, _), part, other in zip(planned, parts, (True, False), strict=True):
            assert isinstance(plan.there, Journey)
            there = Journey(
                plan.there.hops, group, plan.there.formats, plan.there.remote_pairs, forward=other
            )
            going.append((there, plan, there.start((x_ND[part], routing.weights_NK[part]))))
        coming = []
        for there, plan, pending in going:
            x_RD, weights_RK = pending.wait()
            y_RD = _experts(Dispatched(x_RD, weights_RK, plan.arrivals), group)
            coming.append(there.home().start((y_RD,)))
        for pending in coming:
            y_ND.extend(pending.wait())

    sample = measure(there_and_back)
    sent = group.traffic.take()
    _check(torch.cat(y_ND), x_ND, routing, 2**-6)
    both = Sample(
        planned[0][1].start, planned[0][1].end + planned[1][1].end - planned[1][1].start, planned[0][1].wire
    )
    return Run(sample, both, sum(p[2] for p in planned), sent, float("nan"))


def _experts(dispatched: Dispatched, group: ExpertGroup) -> Tensor:
    """As little work as can be: the race is about links. One product for each received row."""
    arrivals, first = dispatched.arrivals, group.rank * EXPERTS // group.size
    numbers_E = torch.arange(first, first + len(arrivals.rows_E)) + 1
    weights_A = dispatched.weights_RK.flatten()[arrivals.assignment_to_slot_A]
    factors_A = weights_A * numbers_E.repeat_interleave(torch.tensor(arrivals.rows_E)) / EXPERTS
    factors_R = torch.zeros(arrivals.num_rows).index_add_(0, arrivals.assignment_to_row_A, factors_A)
    return dispatched.x_RD * factors_R.unsqueeze(-1).to(dispatched.x_RD.dtype)


def _check(y_ND: Tensor, x_ND: Tensor, routing: TokenRouting, tolerance: float) -> None:
    factors_N = (routing.weights_NK * (routing.expert_ids_NK + 1) / EXPERTS).sum(-1, keepdim=True)
    error = (y_ND.float() - x_ND.float() * factors_N).abs()
    if not (error <= tolerance * (factors_N * x_ND.float().abs() + 2**-6)).all():
        raise RuntimeError(f"a dispatcher has lost or changed tokens: off by {error.max():.3g}")
