"""Routing and the balance loss against naive Python, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.context import ModelContext
from deepseek_train.model.router import Router, balance_loss
from deepseek_train.phases.wgrad import WeightGradQueue
from tests.helpers.models import tiny
from tests.helpers.plain import choose


@st.composite
def routers(draw: st.DrawFn) -> ModelConfig:
    """Any sound combination of groups, node limit and top-k."""
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.sampled_from([2, 4, 8]))
    kept = draw(st.integers(1, groups))
    return tiny(
        num_routed_experts=groups * per_group,
        num_expert_groups=groups,
        expert_groups_per_token=kept,
        experts_per_token=kept * draw(st.integers(1, per_group)),
        routed_scale=draw(st.sampled_from([1.0, 2.5])),
    )


def scores_and_bias(m: ModelConfig, seed: int, batch: int = 2, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(
        batch, length, m.num_routed_experts, generator=generator, dtype=torch.float64
    ).sigmoid()
    return scores, 0.2 * torch.randn(m.num_routed_experts, generator=generator, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(routers(), st.integers(0, 10**6))
def test_selection_is_the_naive_one_and_keeps_the_node_limit(m: ModelConfig, seed: int) -> None:
    scores_BTE, bias_E = scores_and_bias(m, seed)
    biased_NE = scores_BTE.flatten(0, 1) + bias_E
    router = Router(ModelContext(m, WeightGradQueue(), dtype=torch.float64))
    router.bias = bias_E
    ids_NK = router.route(scores_BTE).expert_ids_NK
    mask_NE = torch.zeros_like(biased_NE, dtype=torch.bool).scatter_(1, ids_NK, True)
    assert torch.equal(mask_NE, choose(biased_NE, m))
    assert ids_NK.shape == (10, m.experts_per_token)
    groups_used = mask_NE.unflatten(-1, (m.num_expert_groups, -1)).any(-1).sum(-1)
    assert groups_used.max() <= m.expert_groups_per_token
    assert (mask_NE.sum(-1) == m.experts_per_token).all()


@settings(max_examples=30, deadline=None)
@given(routers(), st.integers(0, 10**6))
def test_weights_are_the_unbiased_scores_normalised_and_scaled(m: ModelConfig, seed: int) -> None:
    scores_BTE, bias_E = scores_and_bias(m, seed)
    router = Router(ModelContext(m, WeightGradQueue(), dtype=torch.float64))
    router.bias = bias_E
    routing = router.route(scores_BTE)
    for token, (ids, weights) in enumerate(zip(routing.expert_ids_NK, routing.weights_NK, strict=True)):
        chosen = [float(scores_BTE.flatten(0, 1)[token, e]) for e in ids]
        expected = [s / sum(chosen) * m.routed_scale for s in chosen]
        assert weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(routing.weights_NK.sum(-1), torch.tensor(m.routed_scale, dtype=torch.float64))


def test_weights_survive_scores_that_are_all_but_zero() -> None:
    router = Router(ModelContext(tiny(), WeightGradQueue()))
    routing = router.route(torch.full((1, 3, 16), 1e-30))
    assert torch.isfinite(routing.weights_NK).all()


def test_the_bias_steers_the_selection_only() -> None:
    m = tiny(num_expert_groups=1, expert_groups_per_token=1)
    scores_BTE, _ = scores_and_bias(m, 0)
    router = Router(ModelContext(m, WeightGradQueue(), dtype=torch.float64))
    router.bias = torch.zeros(16, dtype=torch.float64)
    router.bias[3] = 10.0
    scores_BTE.requires_grad_()
    routing = router.route(scores_BTE)
    assert (routing.expert_ids_NK == 3).any(-1).all()
    assert routing.weights_NK.max() < m.routed_scale
    (gradient,) = torch.autograd.grad(routing.weights_NK.square().sum(), scores_BTE)
    touched_NE = gradient.flatten(0, 1) != 0
    assert torch.equal(touched_NE, torch.zeros_like(touched_NE).scatter_(1, routing.expert_ids_NK, True))


def test_scores_are_sigmoids_in_fp32_of_a_bf16_input() -> None:
    m = tiny()
    router = Router(ModelContext(m, WeightGradQueue(), dtype=torch.bfloat16))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, m.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    scores = router(x)
    assert scores.dtype == torch.float32
    expected = torch.sigmoid(x.double() @ router.weight.double().t())
    assert (scores - expected).abs().max() < 1e-6


def naive_balance(scores_BTE: Tensor, top_k: int) -> float:
    """V3 report eq. 17-20, mean over sequences."""
    num_experts, per_sequence = scores_BTE.shape[-1], []
    for sequence in scores_BTE.tolist():
        picked = [sorted(range(num_experts), key=lambda e: -row[e])[:top_k] for row in sequence]
        total = 0.0
        for e in range(num_experts):
            frequency = num_experts / (top_k * len(sequence)) * sum(e in chosen for chosen in picked)
            total += frequency * sum(row[e] / sum(row) for row in sequence) / len(sequence)
        per_sequence.append(total)
    return sum(per_sequence) / len(per_sequence)


@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_balance_loss_is_the_naive_one(top_k: int) -> None:
    scores_BTE, _ = scores_and_bias(tiny(), 1, batch=3, length=7)
    assert float(balance_loss(scores_BTE, top_k)) == pytest.approx(
        naive_balance(scores_BTE, top_k), rel=1e-12
    )


def test_balance_loss_is_one_where_all_is_even_and_more_where_it_is_not() -> None:
    """Sum_i f_i P_i is 1 when every expert is used alike, E / K when the same K take everything."""
    even = torch.eye(16, dtype=torch.float64)[None] + 1e-9
    assert float(balance_loss(even, 1)) == pytest.approx(1.0)
    collapsed = torch.full((1, 16, 16), 1e-9, dtype=torch.float64)
    collapsed[..., :4] = 1.0
    assert float(balance_loss(collapsed, 4)) == pytest.approx(4.0)


def test_balance_loss_gradient_passes_gradcheck() -> None:
    scores_BTE, _ = scores_and_bias(tiny(), 2, length=3)
    assert torch.autograd.gradcheck(lambda s: balance_loss(s, 4), scores_BTE.requires_grad_())
