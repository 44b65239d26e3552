"""64-way expert parallelism, in FP64: eight nodes of eight ranks train as one process does, and send between nodes not
a byte more than they must.

Legend: N tokens, K experts per token, G nodes, D hidden.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from deepseek_train.parallel.expert.announce import TokenRouting
from deepseek_train.parallel.expert.dispatcher import Dispatcher, two_hop
from deepseek_train.parallel.expert.group import ExpertGroup
from deepseek_train.parallel.expert.plan import DispatchPlan
from deepseek_train.phases.parcel import Route
from deepseek_train.phases.wgrad import Weight, allocate_main_grads
from deepseek_train.spec.links import ExpertTraffic
from tests.dist.grid import BATCH, LENGTH, MODEL, Case, Plain, mesh_of, on_mesh, sum_gradients
from tests.harness import run_ranks

RANKS, NODE = 64, 8
NODES = RANKS // NODE
# As in V3: eight groups of experts, one on each node, of which a token's eight experts may be in four.
EXPERTS_64 = replace(
    MODEL,
    name="64 experts",
    num_routed_experts=64,
    experts_per_token=8,
    num_expert_groups=NODES,
    expert_groups_per_token=4,
)
EXPERTS_256 = replace(EXPERTS_64, name="256 experts", num_routed_experts=256)
TRAINED = Case("1f1b", 1, dp=RANKS, ep=RANKS, layers=2, microbatches=1, node=NODE, base=EXPERTS_64)
STEPS = {TRAINED: 3, replace(TRAINED, mtp=0, base=EXPERTS_256): 1}

ROUNDING = 1e-12  # relative to the largest gradient of a weight
# Adam divides by sqrt(v) + eps: an error of a gradient moves its weight by no more than lr / eps of that.
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-3, 0.1


@dataclass(frozen=True)
class Watched:
    """A dispatcher that notes which experts the tokens of this rank ask for."""

    inner: Dispatcher
    ids: list[Tensor]  # [N, K] of each MoE layer and micro-batch

    @property
    def group(self) -> ExpertGroup:
        return self.inner.group

    def announce(
        self, routing: TokenRouting, num_experts: int, layer: int, capacity: int | None = None
    ) -> tuple[Tensor, Route]:
        self.ids.append(routing.expert_ids_NK)
        return self.inner.announce(routing, num_experts, layer, capacity)

    def plan(self, told: Tensor, routing: TokenRouting, num_experts: int) -> DispatchPlan:
        return self.inner.plan(told, routing, num_experts)


@dataclass(frozen=True)
class Step:
    """``losses``: main, then MTP, of each micro-batch, by data-parallel rank."""

    losses: list[list[float]]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class RankSaw:
    steps: list[Step]
    weights: dict[str, Tensor]
    ids: list[Tensor]
    sent: ExpertTraffic


def adamw(weights: dict[str, Weight]) -> AdamW:
    groups = [
        {"params": [w for w in weights.values() if (w.ndim > 1) == decayed], "weight_decay": decayed * DECAY}
        for decayed in (True, False)
    ]
    return AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


def update(optimizer: AdamW, gradients: dict[str, Tensor], weights: dict[str, Weight]) -> None:
    for name, weight in weights.items():
        weight.grad = gradients[name]
    optimizer.step()
    for weight in weights.values():
        weight.grad = None
        weight.main_grad.zero_()


def train_on_ranks(rank: int, _world_size: int) -> list[RankSaw]:
    mesh, found = mesh_of(TRAINED, rank, check_splits=False), []
    for case, num_steps in STEPS.items():
        dispatcher = Watched(two_hop(mesh.expert_group), [])
        grid, steps = on_mesh(case, mesh, torch.float64, dispatcher), []
        weights = {name: weight for name, (_, weight, _) in grid.weights().items()}
        allocate_main_grads(list(weights.values()), torch.float64)
        optimizer = adamw(weights)
        for number in range(num_steps):
            ran = grid.executor.run(grid.prepared(), grid.batch_of(number), case.scales)
            gradients = {name: total.clone() for name, total in sum_gradients(grid).items()}
            update(optimizer, gradients, weights)
            steps.append(Step([[*map(float, (*ran.main.values(), *ran.mtp.values()))]], gradients))
        last = {name: weight.detach() for name, weight in weights.items()}
        found.append(RankSaw(steps, last, dispatcher.ids, mesh.expert_group.traffic.take()))
    return found


@dataclass(frozen=True)
class Expected:
    steps: list[Step]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def train_plainly(_rank: int, _world_size: int) -> list[Expected]:
    found = []
    for case, num_steps in STEPS.items():
        plain = Plain(case, torch.float64, torch.float64)
        weights, steps = plain.weights, []
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        optimizer = adamw(weights)
        for number in range(num_steps):
            ledgers = [hidden.ledger for hidden in plain.train(number).values()]
            losses = [[loss.item() for loss in (one.main, one.mtp) if loss is not None] for one in ledgers]
            gradients = {name: weight.main_grad.clone() for name, weight in weights.items()}
            update(optimizer, gradients, weights)
            steps.append(Step(losses, gradients))
        found.append(Expected(steps, before, {name: weight.detach() for name, weight in weights.items()}))
    return found


Outcomes = dict[Case, tuple[list[RankSaw], Expected]]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    (plain,) = run_ranks(train_plainly, 1, timeout=120)
    ranks = zip(*run_ranks(train_on_ranks, RANKS, timeout=240), strict=True)
    return {case: (list(saw), wanted) for case, saw, wanted in zip(STEPS, ranks, plain, strict=True)}


each_model = pytest.mark.parametrize("case", STEPS, ids=lambda case: case.base.name)


def share(whole: Tensor, part: Tensor, rank: int) -> Tensor:
    """What ``rank`` holds of a weight of which it holds ``part``."""
    return whole if part.shape == whole.shape else whole.chunk(RANKS)[rank]


@each_model
def test_losses_are_those_of_one_process(case: Case, outcomes: Outcomes) -> None:
    ranks, plain = outcomes[case]
    for number, wanted in enumerate(plain.steps):
        found = [losses for rank in ranks for losses in rank.steps[number].losses]
        assert torch.tensor(found).shape == (RANKS, 1 + case.mtp)
        torch.testing.assert_close(found, wanted.losses, rtol=ROUNDING, atol=0.0)
    means = [torch.tensor(step.losses).mean() for step in plain.steps]
    assert means == sorted(means, reverse=True)


@each_model
def test_gradients_of_every_step_are_those_of_one_process(case: Case, outcomes: Outcomes) -> None:
    ranks, plain = outcomes[case]
    for number, wanted in enumerate(plain.steps):
        for rank, saw in enumerate(ranks):
            assert saw.steps[number].gradients.keys() == wanted.gradients.keys()
            for name, gradient in saw.steps[number].gradients.items():
                whole = wanted.gradients[name]
                most = (gradient - share(whole, gradient, rank)).abs().max()
                assert most <= ROUNDING * whole.abs().max(), (number, rank, name)


@each_model
def test_weights_after_the_last_step_are_those_of_one_process(case: Case, outcomes: Outcomes) -> None:
    ranks, plain = outcomes[case]
    for name, after in plain.after.items():
        largest = max(float(step.gradients[name].abs().max()) for step in plain.steps)
        bound = len(plain.steps) * LR * ROUNDING * largest / EPS + ROUNDING * after.abs().max()
        assert (after - plain.before[name]).abs().max() > 0.05 * LR, name
        for rank, saw in enumerate(ranks):
            weight = saw.weights[name]
            assert (weight - share(after, weight, rank)).abs().max() <= bound, (rank, name)


def nodes_of(ids: Tensor, case: Case) -> Tensor:
    """Which nodes hold the experts of each token: bool [N, G]."""
    node_NK = ids * NODES // case.model.num_routed_experts
    return torch.zeros(len(ids), NODES, dtype=torch.bool).scatter_(1, node_NK, True)


@each_model
def test_no_token_needs_more_than_four_nodes(case: Case, outcomes: Outcomes) -> None:
    ranks, _ = outcomes[case]
    counts = torch.cat([nodes_of(ids, case).sum(1) for saw in ranks for ids in saw.ids])
    layers = case.layers - case.dense + case.mtp
    assert len(counts) == STEPS[case] * layers * RANKS * BATCH * LENGTH
    assert counts.max() == case.model.expert_groups_per_token == 4


@each_model
def test_what_crosses_between_nodes_is_exactly_what_must(case: Case, outcomes: Outcomes) -> None:
    """Each token once to every other node with an expert of it, and once back; its gradients the same way."""
    ranks, _ = outcomes[case]
    m, number = case.model, torch.finfo(torch.float64).bits // 8
    crossing = [
        int(nodes_of(ids, case).sum() - nodes_of(ids, case)[:, rank // NODE].sum())
        for rank, saw in enumerate(ranks)
        for ids in saw.ids
    ]
    there, home = (
        m.hidden_size + m.experts_per_token,
        m.hidden_size,
    )  # with routing weights, and their gradients
    least = sum(crossing) * 2 * (there + home) * number
    sent = [saw.sent for saw in ranks]
    assert sum(s.least_cross for s in sent) == least
    assert sum(s.dispatch.cross + s.combine.cross for s in sent) == least
    assert sum(s.dispatch.cross for s in sent) == sum(s.combine.cross for s in sent)
    message = 2 * (2 + BATCH * LENGTH * m.experts_per_token)  # int16: layer, fault, expert ids
    assert sum(s.plan.cross for s in sent) == len(crossing) * (NODES - 1) * message
