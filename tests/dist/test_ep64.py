"""64-way expert parallelism, in FP64: eight nodes of eight ranks train as one process does, and send between nodes not
a byte more than they must.

Legend: N tokens, K experts per token, G nodes, D hidden.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from deepseek_train.optim.adamw import AdamW
from deepseek_train.parallel.expert.announce import TokenRouting
from deepseek_train.parallel.expert.dispatcher import Dispatcher, two_hop
from deepseek_train.parallel.expert.group import ExpertGroup
from deepseek_train.parallel.expert.plan import DispatchPlan
from deepseek_train.parallel.traffic import LinkBytes, Sent
from deepseek_train.phases.parcel import Route
from deepseek_train.phases.wgrad import Weight, allocate_main_grads
from tests.dist.grid import BATCH, LENGTH, MODEL, Case, Plain, on_grid, sum_gradients
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
WHOLE = Case("1f1b", 1, dp=RANKS, ep=RANKS, layers=3, microbatches=1, node=NODE, base=EXPERTS_64)
STEPS = {WHOLE: 3, replace(WHOLE, layers=2, mtp=0, base=EXPERTS_256): 1}

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
    sent: Sent


def adamw(weights: dict[str, Weight], kind: type[AdamW] | type[torch.optim.AdamW]) -> torch.optim.Optimizer:
    groups = [
        {"params": [w for w in weights.values() if (w.ndim > 1) == decayed], "weight_decay": decayed * DECAY}
        for decayed in (True, False)
    ]
    if issubclass(kind, AdamW):
        return kind(groups, betas=BETAS, eps=EPS, moments=torch.float64)
    return kind(groups, lr=LR, betas=BETAS, eps=EPS)


def update(optimizer: torch.optim.Optimizer, gradients: dict[str, Tensor], weights: dict[str, Weight]) -> None:
    for name, weight in weights.items():
        weight.grad = gradients[name]
    for group in optimizer.param_groups:
        group["lr"] = LR
    optimizer.step()
    for weight in weights.values():
        weight.grad = None
        weight.main_grad.zero_()


def train_on_ranks(rank: int, _world_size: int) -> list[RankSaw]:
    found = []
    for case, num_steps in STEPS.items():
        ids: list[Tensor] = []
        grid = on_grid(
            case, rank, torch.float64, dispatcher=lambda _, group, ids=ids: Watched(two_hop(group), ids)
        )
        weights = {name: weight for name, (_, weight, _) in grid.weights().items()}
        allocate_main_grads(list(weights.values()), torch.float64)
        optimizer, steps = adamw(weights, AdamW), []
        for number in range(num_steps):
            ran = grid.executor.run(grid.prepared(), grid.batch_of(number), case.scales)
            gradients = {name: total.clone() for name, total in sum_gradients(grid).items()}
            update(optimizer, gradients, weights)
            losses = [float(loss) for loss in (*ran.main.values(), *ran.mtp.values())]
            steps.append(Step([losses], gradients))
        last = {name: weight.detach() for name, weight in weights.items()}
        found.append(RankSaw(steps, last, ids, grid.mesh.expert_group.traffic.take()))
    return found


def train_plainly(_rank: int, _world_size: int) -> list[tuple[list[Step], dict[str, Tensor], dict[str, Tensor]]]:
    """Steps, and the weights before and after them."""
    found = []
    for case, num_steps in STEPS.items():
        plain = Plain(case, torch.float64, torch.float64)
        weights, steps = plain.weights, []
        first = {name: weight.detach().clone() for name, weight in weights.items()}
        optimizer = adamw(weights, torch.optim.AdamW)
        for number in range(num_steps):
            ledgers = [hidden.ledger for hidden in plain.train(number).values()]
            losses = [[float(loss) for loss in (one.main, one.mtp) if loss is not None] for one in ledgers]
            gradients = {name: weight.main_grad.clone() for name, weight in weights.items()}
            update(optimizer, gradients, weights)
            steps.append(Step(losses, gradients))
        found.append((steps, first, {name: weight.detach() for name, weight in weights.items()}))
    return found


@pytest.fixture(scope="module")
def plain() -> list[tuple[list[Step], dict[str, Tensor], dict[str, Tensor]]]:
    (found,) = run_ranks(train_plainly, 1, timeout=120)
    return found  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ranks() -> list[list[RankSaw]]:
    """By case, by rank."""
    return list(zip(*run_ranks(train_on_ranks, RANKS, timeout=240), strict=True))  # type: ignore[arg-type]
