"""Five steps of the real model with ZeRO-1 on a grid are five steps of torch's AdamW in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.config.schema import CurveConfig, OptimConfig
from deepseek_train.optim.quiet_deepspeed import adopt_process_group
from deepseek_train.optim.replicated import Replicated
from deepseek_train.optim.zero1 import Zero1
from tests.dist.grid import Case, Plain, on_grid
from tests.harness import run_ranks

CASE = Case("dualpipe", 2, dp=2, ep=2, layers=3, microbatches=4)
WORLD, LR, STEPS = CASE.layout.world, 1e-3, 5
NEVER = CurveConfig(0.0)  # curves that the optimizers do not read

# Adam divides by sqrt(v) + eps, so where gradients are nothing but rounding, so is the quotient. eps well above the
# rounding of these gradients (1e-8) makes the comparison one of the optimizers.
WHOLE = OptimConfig(NEVER, NEVER, NEVER, NEVER, eps=1e-5, weight_decay=0.1, clip_norm=0.5)


def train_on_grid(rank: int, _world_size: int, kind: Any) -> tuple[int, dict[str, Tensor], list[float]]:
    adopt_process_group()
    grid = on_grid(CASE, rank, torch.float32)
    optimizer = kind(grid.groups(WHOLE.weight_decay), dist.group.WORLD, WHOLE, torch.float32)
    norms = []
    for number in range(STEPS):
        grid.executor.run(grid.prepared(), grid.batch_of(number), CASE.scales)
        optimizer.reduce()
        norms.append(optimizer.step(LR).grad_norm)
    weights = {name: w.detach() for name, (_, w, _) in grid.weights().items()}
    return grid.mesh.expert_group.rank, weights, norms


def train_plainly(_rank: int, _world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    plain = Plain(CASE, torch.float32, torch.float32)
    start = {name: w.detach().clone() for name, w in plain.weights.items()}
    decayed = [w for name, w in plain.weights.items() if w.ndim > 1]
    gains = [w for name, w in plain.weights.items() if w.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=LR,
        betas=(WHOLE.beta1, WHOLE.beta2),
        eps=WHOLE.eps,
    )
    norms = []
    for number in range(STEPS):
        plain.train(number)
        for weight in plain.weights.values():
            weight.grad = weight.main_grad.clone()
            weight.main_grad.zero_()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.weights.values(), WHOLE.clip_norm)))
        optimizer.step()
    return start, {name: w.detach() for name, w in plain.weights.items()}, norms


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    (found,) = run_ranks(train_plainly, 1)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Zero1, Replicated])
def test_five_steps_are_those_of_adamw_in_one_process(kind: Any, plain: Any) -> None:
    start, wanted, norms = plain
    assert all(norm > 2 * WHOLE.clip_norm for norm in norms), norms  # clipping is at work
    seen = set()
    for ep_rank, weights, found_norms in run_ranks(train_on_grid, WORLD, kind):
        assert found_norms == pytest.approx(norms, rel=1e-5)
        for name, weight in weights.items():
            mine, before = wanted[name], start[name]
            if weight.shape != mine.shape:
                mine, before = mine.chunk(CASE.ep)[ep_rank], before.chunk(CASE.ep)[ep_rank]
            assert (weight - mine).abs().max() < 1e-6, name
            assert (mine - before).abs().max() > 1e-4, name
            seen.add(name)
    assert seen == wanted.keys()
