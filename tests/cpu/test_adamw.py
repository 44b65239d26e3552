"""AdamW: torch's arithmetic bit for bit with FP32 moments, a derived bound with BF16 moments."""

import pytest
import torch

from deepseek_train.optim.adamw import AdamW

BETAS, EPS = (0.9, 0.95), 1e-8
SIZES = ((37, 5), (64,), (1,))
WEIGHT_DECAY = (0.1, 0.0, 0.1)


def ours(weights: list[torch.Tensor], moments: torch.dtype = torch.float32) -> AdamW:
    groups = [{"params": [w], "weight_decay": d} for w, d in zip(weights, WEIGHT_DECAY, strict=True)]
    return AdamW(groups, betas=BETAS, eps=EPS, moments=moments)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def test_fp32_moments_give_torchs_bits() -> None:
    start = [torch.randn(size) for size in SIZES]
    mine = [w.clone() for w in start]
    theirs = [w.clone().requires_grad_() for w in start]
    optimizer = ours(mine)
    reference = torch.optim.AdamW(
        [{"params": [w], "weight_decay": d} for w, d in zip(theirs, WEIGHT_DECAY, strict=True)],
        betas=BETAS,
        eps=EPS,
        fused=True,
    )
    for step in range(12):
        lr = 1e-2 / (step + 1)
        set_lr(optimizer, lr)
        set_lr(reference, lr)
        for a, b in zip(mine, theirs, strict=True):
            gradient = torch.randn(a.shape) * 10.0 ** float(torch.randint(-6, 3, ()))
            a.grad, b.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        for a, b, before in zip(mine, theirs, start, strict=True):
            assert torch.equal(a, b.detach()), step
            assert not torch.equal(a, before)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], reference.state[b]["exp_avg"])
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])


def test_bf16_moments_stay_within_their_rounding() -> None:
    """With gradients of one sign a moment is a sum of positive terms, of which BF16 rounds the old part once a step, by
    at most u = 2^-8 of it. So at step t a moment is off by less than (1 + u)^(t-1) - 1, and m / sqrt(v) by less than
    1.5 times as much, to first order in u; 2 times covers the rest."""
    start = [torch.randn(size) for size in SIZES]
    coarse, fine = [w.clone() for w in start], [w.clone() for w in start]
    optimizers = ours(coarse, torch.bfloat16), ours(fine)
    lr, u = 1e-2, 2.0**-8
    bounds = [torch.zeros(size) for size in SIZES]
    for step in range(1, 9):
        before = [w.clone() for w in fine]
        for a, b in zip(coarse, fine, strict=True):
            a.grad = b.grad = 0.5 + torch.rand(a.shape)
        for optimizer in optimizers:
            set_lr(optimizer, lr)
            optimizer.step()
        for a, b, old, bound, decay in zip(coarse, fine, before, bounds, WEIGHT_DECAY, strict=True):
            update = b - old * (1.0 - lr * decay)
            bound += update.abs() * 2.0 * ((1.0 + u) ** (step - 1) - 1.0) + 2.0**-23 * (1.0 + b.abs())
            assert ((a - b).abs() <= bound).all(), step
            if step == 1:
                # the moments used are rounded only afterwards; torch's fused kernel rounds FP32 in another order
                assert ((a - b).abs() <= 2.0**-22 * (1.0 + b.abs())).all()
    assert all(not torch.equal(a, b) for a, b in zip(coarse[:2], fine[:2], strict=True))
    for w in coarse:
        assert {optimizers[0].state[w][k].dtype for k in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_weights_without_a_gradient_stay(moments: torch.dtype) -> None:
    weights = [torch.randn(size) for size in SIZES]
    optimizer = ours(weights, moments)
    set_lr(optimizer, 0.1)
    weights[0].grad = torch.ones_like(weights[0])
    before = [w.clone() for w in weights]
    optimizer.step()
    assert [torch.equal(w, b) for w, b in zip(weights, before, strict=True)] == [False, True, True]


def test_a_materialised_state_changes_nothing() -> None:
    start = [torch.randn(size) for size in SIZES]
    a, b = [w.clone() for w in start], [w.clone() for w in start]
    first, second = ours(a), ours(b)
    second.materialise()
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in second.state.values())
    for x, y in zip(a, b, strict=True):
        x.grad = y.grad = torch.randn(x.shape)
    for optimizer in (first, second):
        set_lr(optimizer, 1e-2)
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
