"""Plans of all ranks at once, in one process: every rank's plan is made from the same announcements, and rows are
passed around by hand.

Legend: P ranks, C tokens a rank may have at most, K experts per token, N tokens of a rank.
"""

import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from deepseek_train.parallel.expert.alone import plan_alone
from deepseek_train.parallel.expert.announce import Told
from deepseek_train.parallel.expert.flat import plan_flat
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.parallel.expert.journey import UNCHANGED, Hop, Journey
from deepseek_train.parallel.expert.plan import DispatchPlan
from deepseek_train.parallel.expert.two_hop import plan_two_hop

PLANS = {"flat": plan_flat, "two_hop": plan_two_hop}
every_dispatcher = pytest.mark.parametrize("name", PLANS)


@dataclass(frozen=True)
class Routed:
    """Experts of every token of every rank; ``limit``: of nodes per token."""

    nodes: int
    node_size: int
    num_experts: int
    limit: int
    ids_P: tuple[tuple[tuple[int, ...], ...], ...]  # of each rank, of each token

    @property
    def size(self) -> int:
        return self.nodes * self.node_size

    def rank_of(self, expert: int) -> int:
        return expert // (self.num_experts // self.size)

    def node_of(self, rank: int) -> int:
        return rank // self.node_size

    def plans(self, name: str) -> list[DispatchPlan]:
        top_k = max((len(ids) for tokens in self.ids_P for ids in tokens), default=1)
        capacity = max(map(len, self.ids_P))
        ids_PCK = torch.full((self.size, capacity, top_k), -1)
        for rank, tokens in enumerate(self.ids_P):
            for token, ids in enumerate(tokens):
                ids_PCK[rank, token] = torch.tensor(ids)
        told = Told(torch.zeros(self.size, 2, dtype=torch.int64), ids_PCK)
        groups = [ExpertGroup(rank, self.size, self.node_size) for rank in range(self.size)]
        return [PLANS[name](told, len(self.ids_P[g.rank]), self.num_experts, g, UNCHANGED) for g in groups]


@st.composite
def routings(draw: st.DrawFn) -> Routed:
    nodes, node_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_experts = nodes * node_size * draw(st.integers(1, 3))
    limit = draw(st.integers(1, nodes))
    of_node = num_experts // nodes
    top_k = draw(st.integers(1, min(4, limit * of_node)))

    def token() -> tuple[int, ...]:
        kept = draw(st.permutations(range(nodes)))[:limit]
        open_ = [e for n in kept for e in range(n * of_node, (n + 1) * of_node)]
        return tuple(draw(st.permutations(open_))[:top_k])

    counts = [draw(st.integers(0, 5)) for _ in range(nodes * node_size)]
    ids = tuple(tuple(token() for _ in range(count)) for count in counts)
    return Routed(nodes, node_size, num_experts, limit, ids)


def hops_of(plan: DispatchPlan) -> tuple[Hop, ...]:
    assert isinstance(plan.there, Journey)
    return plan.there.hops


def members(routed: Routed, rank: int, among: Among) -> list[int]:
    """Global ranks that take part in an exchange with ``rank``."""
    everyone = range(routed.size)
    match among:
        case Among.ALL:
            return list(everyone)
        case Among.NODES:
            return [r for r in everyone if r % routed.node_size == rank % routed.node_size]
        case Among.NODE:
            return [r for r in everyone if routed.node_of(r) == routed.node_of(rank)]


def passed_on(routed: Routed, held_P: list[Tensor], hops_P: list[Hop]) -> list[Tensor]:
    """One exchange by hand; refuses splits that two ranks see differently."""
    received: list[Tensor] = []
    for me, hop in enumerate(hops_P):
        parts = []
        for index, source in enumerate(members(routed, me, hop.among)):
            theirs = hops_P[source]
            to_me = members(routed, source, theirs.among).index(me)
            assert theirs.send[to_me] == hop.receive[index], (source, me)
            assert len(theirs.taken_S) == sum(theirs.send)
            sent = held_P[source][theirs.taken_S]
            parts.append(sent[sum(theirs.send[:to_me]) :][: theirs.send[to_me]])
        received.append(torch.cat(parts))
    return received


def travelled(routed: Routed, plans: list[DispatchPlan]) -> list[Tensor]:
    """Where every row came from: [R, 2], source rank and token."""
    held = [torch.tensor([(r, t) for t in range(len(ids))]).view(-1, 2) for r, ids in enumerate(routed.ids_P)]
    for hops_P in zip(*map(hops_of, plans), strict=True):
        held = passed_on(routed, held, list(hops_P))
    return held


@every_dispatcher
@settings(max_examples=150)
@given(routed=routings())
def test_every_expert_gets_its_tokens_in_order(name: str, routed: Routed) -> None:
    plans = routed.plans(name)
    per_rank = routed.num_experts // routed.size
    for rank, (plan, rows) in enumerate(zip(plans, travelled(routed, plans), strict=True)):
        arrivals = plan.arrivals
        assert len(rows) == arrivals.num_rows
        assert len({tuple(row) for row in rows.tolist()}) == len(rows), "a token came twice"
        wanted, weights = [], []
        for expert in range(rank * per_rank, (rank + 1) * per_rank):
            for source, tokens in enumerate(routed.ids_P):
                for token, ids in enumerate(tokens):
                    if expert in ids:
                        wanted.append((source, token))
                        weights.append(ids.index(expert))
        found = rows[arrivals.assignment_to_row_A]
        assert [tuple(row) for row in found.tolist()] == wanted
        top_k = max((len(ids) for tokens in routed.ids_P for ids in tokens), default=1)
        slots = arrivals.assignment_to_slot_A
        assert (slots // top_k).tolist() == arrivals.assignment_to_row_A.tolist()
        assert (slots % top_k).tolist() == weights
        assert sum(arrivals.rows_E) == len(wanted)


@every_dispatcher
@settings(max_examples=150)
@given(routed=routings())
def test_sums_bring_every_copy_home(name: str, routed: Routed) -> None:
    """Homeward by hand: every copy counts one at its token, so a token counts the ranks that it was sent to."""
    plans = routed.plans(name)
    values = [torch.ones(plan.arrivals.num_rows, dtype=torch.int64) for plan in plans]
    for hops_P in reversed(list(zip(*map(hops_of, plans), strict=True))):
        came_back = []
        for me, hop in enumerate(hops_P):
            parts = []
            for index, target in enumerate(members(routed, me, hop.among)):
                theirs = hops_P[target]
                from_me = members(routed, target, theirs.among).index(me)
                start = sum(theirs.receive[:from_me])
                parts.append(values[target][start : start + hop.send[index]])
            came_back.append(torch.cat(parts))
        values = []
        for rows, hop in zip(came_back, hops_P, strict=True):
            for one in hop.sums:
                rows = torch.zeros(one.num_sums, dtype=torch.int64).index_add_(0, one.rows_to_sums, rows)
            values.append(rows)
    for ids_N, counted in zip(routed.ids_P, values, strict=True):
        assert counted.tolist() == [len({routed.rank_of(e) for e in ids}) for ids in ids_N]


@settings(max_examples=150)
@given(routed=routings())
def test_two_hops_cross_once_for_every_token_and_node(routed: Routed) -> None:
    """The lower bound, exactly; flat crosses once for every token and rank there."""
    pairs, rows = 0, 0
    for rank, tokens in enumerate(routed.ids_P):
        for ids in tokens:
            ranks = {routed.rank_of(e) for e in ids}
            away = {r for r in ranks if routed.node_of(r) != routed.node_of(rank)}
            nodes = {routed.node_of(r) for r in away}
            assert len({routed.node_of(r) for r in ranks}) <= routed.limit
            pairs, rows = pairs + len(nodes), rows + len(away)
    assert crossing(routed, routed.plans("two_hop")) == pairs
    assert crossing(routed, routed.plans("flat")) == rows
    for name in PLANS:
        assert sum(p.there.remote_pairs for p in routed.plans(name) if isinstance(p.there, Journey)) == pairs


def crossing(routed: Routed, plans: list[DispatchPlan]) -> int:
    """Rows that leave a node."""
    return sum(
        count
        for me, plan in enumerate(plans)
        for hop in hops_of(plan)
        for peer, count in zip(members(routed, me, hop.among), hop.send, strict=True)
        if routed.node_of(peer) != routed.node_of(me)
    )


@pytest.mark.parametrize("name", ["flat", "two_hop", "alone"])
def test_the_host_waits_for_the_device_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors refuse whatever needs their values: but for ``on_host``, whose answers are those of a real plan."""
    size, make = (1, plan_alone) if name == "alone" else (4, PLANS[name])
    ids_PCK, header = torch.randint(0, 8, (size, 5, 3)), torch.zeros(size, 2, dtype=torch.int64)
    group, asked = ExpertGroup(size - 1, size, max(1, size // 2)), []
    module = sys.modules[make.__module__]
    real = module.on_host  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "on_host", lambda *tensors: asked.append(real(*tensors)) or asked[-1])
    expected = make(Told(header, ids_PCK), 5, 8, group, UNCHANGED)
    assert len(asked) == 1
    monkeypatch.setattr(module, "on_host", lambda *_: asked[0])
    with FakeTensorMode() as mode:
        told = Told(mode.from_tensor(header), mode.from_tensor(ids_PCK))
        plan = make(told, 5, 8, group, UNCHANGED)
        with pytest.raises(DataDependentOutputException):
            real(told.ids_PCK)
    assert plan.arrivals.assignment_to_row_A.shape == expected.arrivals.assignment_to_row_A.shape
